"""The toy problem's benchmark: what it makes of runs, without training them for long."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trimtab.models.forecasting import ForecastModelConfig
from trimtab.tasks.forecasting import ForecastingRecipe
from trimtab.train import train
from trimtab.train.compare.grid import RunPlace
from trimtab.train.hardware import Hardware

Bench = Callable[[str], ModuleType]


def test_the_attention_is_read_from_a_run(bench: Bench, tmp_path: Path) -> None:
    toy = bench("forecast_toy")
    model = ForecastModelConfig("samformer", lookback=8, horizon=3, revin=False)
    recipe = ForecastingRecipe(
        data="toy", model=model, stabilizer="sigma", steps=2, batch_size=100, watch_every=2, eval_every=2
    )
    train(recipe, tmp_path, hardware=Hardware(accelerator="cpu"))
    found = toy.attention_map(RunPlace("sigma", "sigma", recipe, tmp_path))
    assert len(found) == 7
    assert [sum(row) for row in found] == pytest.approx([1.0] * 7)


def test_runs_for_tuning_have_no_test_part_and_the_others_the_sharpness(bench: Bench) -> None:
    toy = bench("forecast_toy")
    for name, (_, _, settings) in toy.ARMS.items():
        assert isinstance(toy.recipe(name, settings[0], toy.tuning.SEED, False), toy.Tuning)
        assert isinstance(toy.recipe(name, settings[0], 1, False), toy.Sharp)


def test_the_picture_has_runs_that_ended_and_arms_that_failed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, pictures = bench("forecast_toy"), bench("forecast_toy_pictures")
    monkeypatch.setattr(bench("measure"), "RESULTS", tmp_path)
    curves = {"step": [100, 200, 300], "loss": [3.0, 2.0, 1.5], "mse": [3.0, 2.5, math.nan]}
    curves |= {"entropy_min": [0.9, 0.5, 0.1], toy.RAW: [1.0, 9.0, 4.0]}
    rows: list[dict[str, Any]] = [
        {"arm": "sam", "seed": 1, "status": "finished", "test_mse": 1.1, "curves": curves},
        {"arm": "sigma", "seed": 1, "status": "failed"},
    ]
    assert pictures.draw("toy", rows, {"sam": [[0.5, 0.5], [0.1, 0.9]]}, 1.0).stat().st_size > 10_000
    table = {arm: toy.summary([row for row in rows if row["arm"] == arm]) | {"setting": {}} for arm in ("sam", "sigma")}
    toy.show(table)
    assert table["sigma"]["failed"] == 1
