"""What the benchmark of depth makes of its runs."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from translation_corpus import sentences, small_recipe, write_folder

from trimtab.models.encoder_decoder import EncoderDecoder
from trimtab.stabilizers import stabilize_
from trimtab.tasks.translation.pairs import find_corpus
from trimtab.tasks.translation.sentences import load_encoded, plain_tokenizer
from trimtab.tasks.translation.translation_recipe import TranslationRecipe
from trimtab.train import Hardware, train
from trimtab.train.compare.grid import RunPlace


@pytest.fixture(scope="module")
def depth(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("depth")


def test_arms_differ_in_nothing_but_norm_and_stabilizer(depth: ModuleType) -> None:
    for optimizer in depth.LRS:
        arms: dict[str, TranslationRecipe] = depth.arms(6, optimizer, 300)
        same = [replace(arm, stabilizer="none", model=replace(arm.model, norm="post")) for arm in arms.values()]
        assert all(each == same[0] for each in same)
        assert same[0].warmup_steps == 0
    sigma, control = (arms[name].stabilizer.partition(":")[2] for name in ("sigma", "init-scale"))
    assert sigma == control == "gamma_init=one"
    assert {name for name, arm in arms.items() if arm.model.norm == "pre"} == {"pre-LN"}


def test_control_and_sigma_start_as_the_same_function(depth: ModuleType) -> None:
    arms: dict[str, TranslationRecipe] = depth.arms(2, "adam", 300)
    source, target = torch.tensor([[5, 9, 30, 2]]), torch.tensor([[1, 40, 3]])
    outputs = []
    for name in ("sigma", "init-scale"):
        torch.manual_seed(0)
        model = stabilize_(EncoderDecoder(arms[name].model).double(), arms[name].stabilizer)
        outputs.append(model.eval()(source, target).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)  # sigma is tracked in float32 or better


def test_a_row_has_every_layer(depth: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = small_recipe(
        write_folder(tmp_path / "own"), decode="never", watch=True, steps=2, watch_every=1, eval_every=2
    )
    train(recipe, tmp_path / "run", hardware=Hardware(accelerator="cpu"))
    row = depth.row(RunPlace("post-LN", "post-LN", recipe, tmp_path / "run"), unigram=1.0)
    assert set(row["entropy_by_layer"]) == {
        "encoder.0.attention",
        "decoder.0.attention",
        "decoder.0.cross_attention",
    }
    assert {"encoder.0", "decoder.0"} <= set(row["gradient_by_layer"]["first"])
    assert row["loss"] > 1.0
    assert not row["trained"]
    assert depth.row(RunPlace("post-LN", "post-LN", recipe, tmp_path / "run"), unigram=row["loss"] + 0.2)["trained"]


def test_the_best_learning_rate_is_that_of_the_lowest_median_and_what_broke_is_no_best(depth: ModuleType) -> None:
    def run(seed: int, lr: float, loss: float) -> dict[str, Any]:
        layers = {"first": {"encoder.0": 0.5, "encoder.5": 2.0}}
        return {
            "arm": "sigma", "optimizer": "adam", "depth": 6, "lr": lr, "seed": seed, "loss": loss,
            "trained": loss < 5, "entropy_min": None, "gradient_by_layer": layers, "step_seconds": None,
        }  # fmt: skip

    losses = {1e-3: (4.0, 4.2, 6.0), 3e-3: (3.0, math.inf, math.inf)}
    (found,) = depth.table_of([run(seed, lr, loss) for lr, each in losses.items() for seed, loss in enumerate(each)])
    assert (found["best_lr"], found["loss"], found["trained"]) == (1e-3, 4.2, 0.5)
    assert found["trained_by_lr"] == {"0.001": pytest.approx(2 / 3), "0.003": pytest.approx(1 / 3)}
    assert found["gradient_last_over_first"] == 4.0
    assert found["seeds"] == [0, 1, 2]


def test_the_verdict_names_the_learning_rates_that_the_start_does_not_explain(depth: ModuleType) -> None:
    def line(arm: str, trained: list[float], loss: float) -> dict[str, Any]:
        by_lr = dict(zip(("0.001", "0.003", "0.01"), trained, strict=True))
        return {"optimizer": "lars", "depth": 6, "arm": arm, "trained_by_lr": by_lr, "loss": loss}

    def told(post: list[float], sigma: list[float], start: list[float]) -> str:
        table = [line("post-LN", post, math.inf), line("sigma", sigma, 4.5), line("init-scale", start, 4.6)]
        (found,) = depth.verdict(table)
        return str(found)

    assert told([1, 0, 0], [1, 1, 1], [1, 1, 0.2]) == (
        "lars 6+6: at 2 of 3 learning rates sigma trains and post-LN does not; of these the start alone does not "
        "explain 0.01; lowest loss: sigma, 4.50"
    )
    assert "does not explain any" in told([0, 0, 0], [0, 1, 1], [0, 1, 1])
    assert "sigma trains nowhere that post-LN does not" in told([1, 1, 0], [1, 1, 0.5], [0, 0, 0])
    assert "sigma does not train" in told([1, 0, 0], [0, 0, 0.5], [0, 0, 0])


def test_the_unigram_model_is_that_of_the_frequencies(
    depth: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    corpus = find_corpus(str(write_folder(tmp_path / "own")), "en", "de")
    encoded = load_encoded(corpus, 290, 290, joint=True)
    monkeypatch.setattr(depth, "find_corpus", lambda *_: corpus)
    tokenizer = plain_tokenizer(encoded.target_tokenizer)
    count = dict.fromkeys(range(290), 1)
    for line in sentences(80, 0)[1]:
        for token in [*tokenizer.encode(line, add_special_tokens=False).ids, 2]:
            count[token] += 1
    losses = [
        -math.log(count[token] / sum(count.values()))
        for line in sentences(12, 1)[1]
        for token in [*tokenizer.encode(line, add_special_tokens=False).ids, 2]
    ]
    assert depth.unigram_loss(290) == pytest.approx(sum(losses) / len(losses))


def test_depths_learning_rates_and_seeds_of_earlier_calls_stay_in_the_results(
    depth: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depth.measure, "RESULTS", tmp_path)
    facts = {"steps": 300, "unigram_loss": 5.25}
    now = [{"depth": 18, "lr": 0.01, "seed": 1}]
    assert depth.other_runs("depth", facts, now) == []
    rows = [
        {"depth": number, "lr": lr, "seed": seed, "loss": math.inf}
        for number in (6, 18)
        for lr in (0.003, 0.01)
        for seed in (0, 1)
    ]
    depth.measure.write("depth", facts | {"runs": rows})
    assert depth.other_runs("depth", facts, now) == rows[:-1]
    assert depth.other_runs("depth", facts | {"steps": 600}, now) == []


def test_a_learning_rate_is_tuned_among_its_neighbours(bench: Callable[[str], ModuleType]) -> None:
    depth = bench("depth_bleu")
    assert depth.beside(0.003) == [1e-3, 3e-3, 1e-2]
    assert depth.beside(3e-4) == [3e-4, 1e-3]
    assert depth.beside(0.0001) == [0.0001]  # of a table with learning rates of its own
