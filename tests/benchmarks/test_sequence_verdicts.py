"""What the benchmarks of language, speech, TEV and depth say of their tables."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def test_language_calls_no_arm_a_cure_that_merely_moves_the_optimum(bench: Callable[[str], ModuleType]) -> None:
    verdict = bench("language").verdict
    arms = {
        "pre-LN": {"lr_sensitivity": [0.3, 0.25, 0.35], "best_loss": [2.2, 2.15, 2.25]},
        "sigma": {"lr_sensitivity": [0.1, 0.05, 0.2], "best_loss": [2.4, 2.3, 2.5]},
        "softcap": {"lr_sensitivity": [0.1, 0.05, 0.2], "best_loss": [2.2, 2.1, 2.3]},
        "qk-norm": {"lr_sensitivity": [0.2, 0.15, 0.26], "best_loss": [2.0, 1.9, 2.1]},
        "init-scale": {"lr_sensitivity": [0.5, 0.4, 0.6], "best_loss": [2.0, 1.9, 2.1]},
    }
    assert verdict({"3 × 64": arms}) == [
        "3 × 64, sigma: steadier than pre-LN, merely moves the optimum: its best loss is higher",
        "3 × 64, softcap: steadier than pre-LN, and its best loss is not told apart",
        "3 × 64, qk-norm: not told apart from pre-LN in LR sensitivity",
        "3 × 64, init-scale: less steady than pre-LN",
    ]
    one_seed = {arm: {key: [value[0], math.nan, math.nan] for key, value in each.items()} for arm, each in arms.items()}
    assert all("not told apart from pre-LN" in line for line in verdict({"3 × 64": one_seed}))
    assert verdict({"3 × 64": {arm: {} for arm in arms}}) == ["one seed, or one learning rate, tells no arms apart"]


def test_speech_tells_the_single_number_from_the_ease(bench: Callable[[str], ModuleType]) -> None:
    speech = bench("speech")
    chosen = speech.arms("digits", None, gpu=False, quick=True)
    assert {arm.removesuffix(", SGD") for arm in chosen["sgd"]} <= set(chosen["adam"])
    assert all(recipe.optimizer == "sgd" for recipe in chosen["sgd"].values())

    def each(wer: list[float], near: int, trained: float) -> dict[str, Any]:
        return {"test_wer": wer, "lrs_near_best": near, "trained": trained}

    table = {
        "post-LN": each([0.10, 0.12], 2, 0.5),
        "sigma": each([0.13, 0.14], 4, 0.9),
        "sigma, SGD": each([0.11, 0.14], 2, 0.5),
        "init-scale": each([0.05, 0.06], 1, 0.2),
        "init-scale, SGD": each([1.0, 1.0], 0, 0.0),
    }
    lines = speech.verdict(table)
    for line, single, ease in zip(
        lines,
        ("post-LN's test WER is lower", "test WERs overlap", "its test WER is lower", "post-LN's test WER is lower"),
        ("easier to get", "as easy to get", "harder to get", "harder to get"),
        strict=True,
    ):
        assert single in line
        assert ease in line
    assert lines[0].endswith("(near the best at 4 learning rates against 2, 90% of runs trained against 50%)")


def test_tev_stands_in_only_with_all_of_its_interval(bench: Callable[[str], ModuleType]) -> None:
    tev = bench("tev")
    cells = ([0.9, 0.8, 0.95], [0.8, 0.5, 0.9], [0.1, -0.2, 0.4], [-0.5, -0.7, -0.2])
    answers = ("stands in", "too loosely to stand in", "not told apart from no connection", "goes against it")
    table = {
        f"{name} ~ {variance}": {"same cell": cell}
        for name in tev.TEV
        for variance, cell in zip(tev.VARIANCES, cells, strict=True)
    }
    table[f"sigma ~ {tev.VARIANCES[-1]}"]["same cell"] = [math.nan] * 3
    *lines, cost = tev.verdict(table, {"small": {"tev / entries": 0.1}})
    for line, answer in zip(lines, (*answers, *answers[:3], "too few runs to tell"), strict=True):
        assert answer in line
    assert "0.100 times" in cost


def test_depth_of_language_models_calls_even_growth_exponential(bench: Callable[[str], ModuleType]) -> None:
    def arm(perplexity: list[float]) -> dict[str, Any]:
        return {"growth_start": [0.2, 0.19], "growth_end": [0.2, 0.05], "perplexity": perplexity}

    table = {"12": {"vanilla": arm([100.0, 110.0]), "MLRA": arm([90.0, 99.0]), "sigma": arm([111.0])}}
    assert bench("depth_lm").verdict(table) == [
        "12 layers, vanilla's output variance: exponential at the start (20.0% a layer, then 19.0%), not exponential "
        "at the end (20.0% a layer, then 5.0%)",
        "12 layers, MLRA: perplexity below vanilla's",
        "12 layers, sigma: perplexity above vanilla's (one seed)",
    ]
    broken = {"growth_start": [math.nan] * 2, "growth_end": [math.nan] * 2, "perplexity": []}
    assert bench("depth_lm").verdict({"12": {"vanilla": broken, "MLRA": broken}}) == []


def test_some_arms_of_speech_alone(bench: Callable[[str], ModuleType]) -> None:
    speech = bench("speech")
    chosen = speech.arms("digits", None, 70, gpu=False, quick=False)
    kept = speech.some(chosen, ["pre-LN", "sigma"])
    assert kept == {"adam": {"pre-LN": chosen["adam"]["pre-LN"], "sigma": chosen["adam"]["sigma"]}}
    assert kept["adam"]["pre-LN"].steps == 70
    assert kept["adam"]["pre-LN"].warmup_steps == 7
    with pytest.raises(SystemExit, match="no arm post; there are: post-LN; pre-LN"):
        speech.some(chosen, ["post"])
