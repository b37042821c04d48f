"""What the benchmark of forecasting makes of its runs."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

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
    assert "0 of 2 cells; of those that are other models: 2" in lines[1]
    assert "16.67 %" in lines[2]
    assert lines[3].endswith(" 4.0 (published: about 4)")


def test_a_run_that_failed_is_infinitely_bad_and_never_chosen(bench: Bench) -> None:
    table, grid = bench("forecasting_table"), bench("forecasting")
    failed = {"runs": [{"seed": 1, "status": "failed"}]}
    assert table.errors({"adam": failed}, "adam") == {1: math.inf}
    assert table.beats({"samformer": arm(0.5), "adam": failed}, ["adam"])
    assert grid.best([({"lr": 1.0}, math.inf), ({"lr": 0.3}, 0.5), ({"lr": 0.1}, 0.5)]) == {"lr": 0.3}


def test_every_arm_has_six_settings_and_a_recipe(bench: Bench) -> None:
    arms = bench("forecasting_arms")
    for name, each in arms.ALL.items():
        first = arms.first_settings(each)
        settings = first + arms.next_settings(each, first[0])
        assert len({str(setting) for setting in settings}) == 6, name
        recipes = {repr(arms.recipe("ETTh1", 96, each, setting, 0)) for setting in settings}
        assert len(recipes) == 6, name  # every setting changes something


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
