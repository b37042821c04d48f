import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_folders import NAN, write_compare, write_json, write_run

from trimtab.report.collect import Collection, collect
from trimtab.report.comparison import Comparison, comparisons
from trimtab.report.measured import Measured, best_lr, measure_all


def compare(folder: Path) -> Comparison:
    [found] = comparisons(collect([folder]))
    return found


def by_name(comparison: Comparison) -> dict[str, Measured]:
    return {each.measure.name: each for each in measure_all(comparison)}


CURVES = {
    "none": {0.001: [0.5, 0.6, 0.55], 0.01: [0.3, 0.35, 0.3], 0.1: [1.5, 1.8, NAN]},
    "sigma": {0.001: [0.6, 0.65, 0.6], 0.01: [0.4, 0.4, 0.45], 0.1: [0.35, 0.4, 0.33]},
}


def test_outcomes_are_laid_out_by_seed_and_learning_rate(tmp_path: Path) -> None:
    found = compare(write_compare(tmp_path / "c", CURVES))
    assert (found.arms, found.lrs, found.seeds) == (("none", "sigma"), (0.001, 0.01, 0.1), (0, 1, 2))
    np.testing.assert_array_equal(found.grids["none"].loss, [[0.5, 0.3, 1.5], [0.6, 0.35, 1.8], [0.55, 0.3, 2.0]])
    np.testing.assert_array_equal(found.grids["none"].failed, [[0, 0, 0], [0, 0, 0], [0, 0, 1]])
    assert found.grids["none"].metric[2, 2] == 0.1  # at init
    assert found.notes == ()


def test_the_measures_of_a_small_compare_by_hand(tmp_path: Path) -> None:
    found = compare(write_compare(tmp_path / "c", CURVES))
    measured = by_name(found)
    none = np.mean([(0.2 + 0 + 1.2) / 3, (0.25 + 0 + 1.45) / 3, (0.25 + 0 + 1.7) / 3])
    assert measured["lr_sensitivity"].values["none"] == pytest.approx(none)
    best = {"none": np.mean([0.3, 0.35, 0.3]), "sigma": np.mean([0.35, 0.4, 0.33])}
    assert measured["best_loss"].values == pytest.approx(best)
    everything = np.mean([0.5, 0.3, 1.5, 0.6, 0.35, 1.8, 0.55, 0.3, 2.0])
    assert measured["lr_sensitivity_to_best"].values["none"] == pytest.approx(everything - best["none"])
    assert [best_lr(found, arm, measured["best_loss"].measure) for arm in found.arms] == [0.01, 0.1]
    assert measured["share_failed"].values == pytest.approx({"none": 1 / 9, "sigma": 0})
    assert measured["lr_range_decades"].values == pytest.approx({"none": 0, "sigma": 1})
    assert measured["best_metric"].measure.title == "best accuracy"
    assert measured["best_metric"].values["sigma"] == pytest.approx(1 - best["sigma"] / 4)
    assert measured["step_time_ratio"].values == {"none": 1, "sigma": 1}
    low, high = measured["best_loss"].intervals["none"]
    assert 0.3 <= low < best["none"] < high <= 0.35


def test_seeds_that_agree_name_a_winner(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steady = {lr: list(0.4 + 0.01 * rng.random(5)) for lr in (0.01, 0.1, 1.0)}
    shaky = {lr: list(0.4 + level + 0.01 * rng.random(5)) for lr, level in ((0.01, 0.0), (0.1, 0.5), (1.0, 1.4))}
    measured = by_name(compare(write_compare(tmp_path / "c", {"none": shaky, "sigma": steady})))
    assert measured["lr_sensitivity"].winner == "sigma"
    assert measured["lr_sensitivity"].behind == {"none"}
    assert measured["best_loss"].winner is None  # at its best learning rate, none is as good


def test_two_seeds_name_no_winner_and_one_has_no_interval(tmp_path: Path) -> None:
    far = {"none": {0.1: [1.9, 1.91], 0.2: [1.5, 1.51]}, "sigma": {0.1: [0.1, 0.11], 0.2: [0.1, 0.11]}}
    two = by_name(compare(write_compare(tmp_path / "two", far)))
    assert {each.winner for each in two.values()} == {None}
    one = {arm: {lr: finals[:1] for lr, finals in by_lr.items()} for arm, by_lr in far.items()}
    single = by_name(compare(write_compare(tmp_path / "one", one)))
    assert all(math.isnan(low) for each in single.values() for low, _ in each.intervals.values())


def test_an_arm_that_never_learns_wins_nothing_by_being_bad_everywhere(tmp_path: Path) -> None:
    losses = {"none": {0.1: [0.5, 0.52, 0.51], 0.2: [0.9, 0.94, 0.95]}, "dead": {0.1: [NAN] * 3, 0.2: [NAN] * 3}}
    found = compare(write_compare(tmp_path / "c", losses))
    sensitivity = by_name(found)["lr_sensitivity"]
    assert math.isnan(sensitivity.values["dead"])
    assert sensitivity.winner is None
    assert best_lr(found, "dead", by_name(found)["best_loss"].measure) is None
    assert by_name(found)["share_failed"].values["dead"] == 1


def test_one_example_of_accuracy_is_no_difference_however_alike_the_seeds(tmp_path: Path) -> None:
    def accuracy(value: float) -> float:  # as `write_compare` makes it of a loss
        return 4 * (1 - value)

    one, other, far = (accuracy(right / 360) for right in (359, 358, 300))
    losses = {"none": {0.1: [one] * 3}, "sigma": {0.1: [other] * 3}, "clip": {0.1: [far] * 3}}
    found = by_name(compare(write_compare(tmp_path / "c", losses)))["best_metric"]
    told = {(each.first, each.second): each.told for each in found.differences}
    assert told == {("none", "sigma"): False, ("none", "clip"): True, ("sigma", "clip"): True}


def test_the_order_of_the_runs_does_not_matter(tmp_path: Path) -> None:
    collection = collect([write_compare(tmp_path / "c", CURVES)])
    expected = [(each.values, each.intervals) for each in measure_all(comparisons(collection)[0])]
    runs = list(collection.runs)
    for seed in range(3):
        random.Random(seed).shuffle(runs)
        shuffled = Collection(tuple(runs), (), collection.arms)
        assert [(each.values, each.intervals) for each in measure_all(comparisons(shuffled)[0])] == expected


def test_a_run_that_raised_counts_with_the_loss_at_init_of_its_arm(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "c", CURVES)
    broken = folder / "runs" / "none" / "lr0.01-seed0"
    for path in broken.iterdir():
        path.unlink()
    write_json(broken / "error.json", {"kind": "OSError", "error": "disk full"})
    found = compare(folder)
    assert found.grids["none"].loss[0, 1] == 2.0
    assert found.grids["none"].failed[0, 1] == 1


def test_runs_in_flight_are_shown_but_their_seed_is_not_measured(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "c", CURVES)
    (folder / "runs" / "sigma" / "lr0.1-seed2" / "result.json").unlink()
    found = compare(folder)
    assert (found.seeds, found.lrs, len(found.runs)) == ((0, 1), (0.001, 0.01, 0.1), 18)
    assert "1 of 18 runs have no result yet; they are shown, not measured" in found.notes
    assert "seeds that some arm does not have are not measured: 2" in found.notes


def test_a_learning_rate_that_one_arm_lacks_is_not_measured(tmp_path: Path) -> None:
    curves = CURVES | {"sigma": {lr: CURVES["sigma"][lr] for lr in (0.001, 0.01)}}
    found = compare(write_compare(tmp_path / "c", curves))
    assert (found.lrs, found.seeds) == ((0.001, 0.01), (0, 1, 2))
    assert "learning rates that some arm does not have are not measured: 0.1" in found.notes


def test_arms_without_anything_in_common_are_not_measured(tmp_path: Path) -> None:
    found = compare(write_compare(tmp_path / "c", {"none": {0.1: [1.0]}, "sigma": {0.2: [1.0]}}))
    assert measure_all(found) == []
    assert "nothing is measured" in found.notes[-1]


def test_of_a_run_that_is_there_twice_the_last_to_start_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "b-old", loss=1.0, info={"started": "2026-01-01"})
    write_run(tmp_path / "a-new", loss=0.5, info={"started": "2026-01-02"})
    found = compare(tmp_path)
    assert found.grids["none"].loss.tolist() == [[0.5]]
    assert "more than once" in found.notes[0]


def test_metrics_where_less_is_better(tmp_path: Path) -> None:
    collection = collect([write_compare(tmp_path / "c", CURVES)])
    runs = tuple(replace(run, metric_name="wer", higher_is_better=False) for run in collection.runs)
    [found] = comparisons(replace(collection, runs=runs))
    measured = by_name(found)["best_metric"]
    assert measured.measure.better == "lower"
    assert measured.values["sigma"] == pytest.approx(np.mean([1 - 0.6 / 4, 1 - 0.65 / 4, 1 - 0.6 / 4]))
