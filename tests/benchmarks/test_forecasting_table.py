"""What the benchmark of forecasting makes of its runs."""

import math
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trimtab.tasks.forecasting import ForecastingRecipe

Bench = Callable[[str], ModuleType]


def arm(*errors: float, parameters: int = 1) -> dict[str, Any]:
    runs = [{"seed": seed, "test_mse": mse, "parameters": parameters} for seed, mse in enumerate(errors, 1)]
    return {"runs": runs, "setting": {}}


def test_published_improvement_is_that_of_the_sums(bench: Bench) -> None:
    assert bench("forecasting_table").gain([(1.0, 2.0), (3.0, 3.0)]) == pytest.approx(1 - 4 / 5)


def test_headlines_count_cells_below_published_and_below_every_other_arm(bench: Bench) -> None:
    arms = {"samformer": arm(0.370, 0.380), "adam": arm(0.370, 0.371), "tsmixer": arm(0.4, 0.5, parameters=4)}
    lines = bench("forecasting_table").headlines({"ETTh1": {96: arms}, "ETTh2": {96: arms}})
    assert lines[0].endswith("1 of 2 cells")  # .375 is below .381 and above .295
    assert lines[1].endswith("0 of 0 cells that have them")  # no cell has them all
    assert "16.67 %" in lines[5]
    assert ": 4.0 (published: about 4)" in lines[6]
    whole = arms | {name: arm(0.38, 0.39) for name in ("tsmixer+sam", "dlinear", "itransformer")}
    lines = bench("forecasting_table").headlines({"ETTh1": {96: whole}, "ETTh2": {96: arms}})
    assert lines[1].endswith("0 of 1 cells that have them")  # Adam is below
    assert lines[2].endswith("have been run: 0 of 2 cells")
    assert lines[3].endswith("1 of 1 cells that have them")
    lines = bench("forecasting_table").headlines({"ETTh1": {96: {"samformer": arm(0.37), "adam": arm(0.371)}}})
    assert lines[2].endswith("have been run: 1 of 1 cells")


def test_a_run_that_failed_is_infinitely_bad_and_never_chosen(bench: Bench) -> None:
    table, grid = bench("forecasting_table"), bench("tuning")
    failed = {"runs": [{"seed": 1, "status": "failed"}]}
    assert table.errors({"adam": failed}, "adam") == {1: math.inf}
    assert table.beaten([{"samformer": arm(0.5), "adam": failed}], ["adam"]).startswith("1 of 1")
    cell = {"samformer": arm(0.5, 0.6), "tsmixer": failed | {"setting": {}}, "adam": arm(0.4, math.inf)}
    assert len(table.cell_lines("ETTh1", 96, cell)) == 4
    assert len(table.headlines({"ETTh1": {96: cell}})) == 6  # no ratio of parameters
    assert grid.best([({"lr": 1.0}, math.inf), ({"lr": 0.3}, 0.5), ({"lr": 0.1}, 0.5)]) == {"lr": 0.3}


def test_a_cell_has_what_nothing_learned_has(bench: Bench) -> None:
    naive = {"96": {"last value": {"mse": 0.5, "mae": 0.25}}}
    lines = bench("forecasting_table").cell("ETTh1", 96, {"cells": {"96": {}}, "naive": naive})
    assert lines[1] == "ETTh1, horizon 96"
    assert lines[-1].split() == ["last", "value", "0.5000", "0.2500"]
    assert len(bench("forecasting_table").cell("ETTh1", 96, {"cells": {"96": {}}})) == 3  # of older results


def test_every_arm_has_nine_settings_and_a_recipe(bench: Bench) -> None:
    arms = bench("forecasting_arms")
    for name, each in arms.ALL.items():
        settings = arms.settings(each, 0, None)
        for stroke in range(1, len(each.strokes)):
            settings += arms.settings(each, stroke, settings[1])
        assert len({str(setting) for setting in settings}) == 9, name
        recipes = {repr(arms.recipe("ETTh1", 96, each, setting, 0)) for setting in settings}
        assert len(recipes) == 9, name  # every setting changes something
        tuned = {stroke for stroke, _ in each.strokes}
        assert "lr" in tuned, name
        assert ("rho" in tuned) == ("sam" in each.stabilizer), name


def test_learning_rates_of_a_later_stroke_are_times_the_best(bench: Bench) -> None:
    arms = bench("forecasting_arms")
    assert arms.settings(arms.ARMS["adam"], 2, {"lr": 3.0, "weight_decay": 0.1}) == [
        {"lr": 6.0, "weight_decay": 0.1},
        {"lr": 1.5, "weight_decay": 0.1},
    ]
    assert arms.settings(arms.ARMS["samformer"], 1, {"rho": 0.5}) == [{"rho": 0.5, "lr": 3.0}, {"rho": 0.5, "lr": 0.3}]


def test_from_an_edge_it_goes_on_outwards(bench: Bench) -> None:
    arms = bench("tuning")
    rates = [{"lr": 3.0}, {"lr": 1.0}, {"lr": 0.3}]
    assert arms.beyond(rates, {"lr": 1.0}) == []
    assert arms.beyond(rates, {"lr": 3.0}) == [{"lr": 6.0}]
    assert arms.beyond([*rates, {"lr": 6.0}], {"lr": 3.0}) == []
    assert arms.beyond(rates, {"lr": 0.3, "dropout": 0.3}) == [{"lr": 0.15, "dropout": 0.3}]
    both = [{"rho": 0.3}, {"rho": 0.5}, {"rho": 0.3, "lr": 3.0}, {"rho": 0.3, "lr": 0.3}]
    assert arms.beyond(both, both[2]) == [{"rho": 0.15, "lr": 3.0}, {"rho": 0.3, "lr": 6.0}]
    assert arms.beyond(both, both[1]) == [{"rho": 1.0}]
    assert arms.beyond(rates[:1], rates[0]) == []  # one value has no edge


@pytest.mark.skipif(not os.environ.get("TRIMTAB_DATA"), reason="TRIMTAB_DATA is not set")
def test_what_is_tuned_sees_no_test_part(bench: Bench) -> None:
    arms = bench("forecasting_arms")
    made = [arms.recipe("ETTh1", 96, arms.ARMS["dlinear"], {"lr": 1.0}, 0, tuning=tuning) for tuning in (True, False)]
    assert [recipe.task().test is None for recipe in made] == [True, False]
    assert [repr(made[0]).partition("(")[2], type(made[1])] == [repr(made[1]).partition("(")[2], ForecastingRecipe]


def test_a_line_of_a_cell_has_what_chose_and_what_heads_ended_with(bench: Bench) -> None:
    def ended(entropies: list[float | None]) -> dict[str, Any]:
        runs = [
            {"seed": seed, "test_mse": 0.4, "test_mae": 0.3, "validation_mse": 0.6 + 0.1 * seed, "entropy_min_end": low}
            for seed, low in enumerate(entropies)
        ]
        return {"setting": {"rho": 0.5}, "runs": runs}

    arms = {"samformer": ended([0.25, 0.5]), "dlinear": ended([None, None])}
    _, attends, linear = bench("forecasting_table").cell_lines("ETTh1", 96, arms)
    assert attends.split()[:8] == ["samformer", "0.381", "0.4000", "±", "0.0000", "0.3000", "0.6500", "0.25-0.50"]
    assert "0.25" not in linear
    assert "0.6500" in linear


@pytest.mark.skipif(not os.environ.get("TRIMTAB_DATA"), reason="TRIMTAB_DATA is not set")
def test_the_first_strokes_alone_leave_out_the_rest(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecasting = bench("forecasting")
    monkeypatch.setattr(forecasting, "run", lambda places, jobs: None)
    for strokes, count in ((None, 9), (3, 8), (1, 4)):
        options = Namespace(data="ETTh1", quick=False, strokes=strokes, jobs=1)
        tried = forecasting.tuned(options, tmp_path, 96, ["dlinear"])["dlinear"]
        settings = [setting for setting, _ in tried[:count]]
        assert any(setting["revin"] for setting in settings) == (strokes is None)
        outwards = tried[count:]  # no run has been: the first setting stands for the best
        assert all(setting["lr"] > 3.0 for setting, _ in outwards)
