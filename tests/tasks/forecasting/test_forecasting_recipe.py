import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.errors import DataError, RecipeError
from trimtab.models.forecasting import ForecastModelConfig
from trimtab.tasks.forecasting import ForecastingRecipe, published
from trimtab.tasks.forecasting.naive import last_season, last_value, measure
from trimtab.tasks.forecasting.recipes import FORECASTING_RECIPES
from trimtab.tasks.forecasting.sets import BENCHMARKS
from trimtab.tasks.recipes import find_recipe, recipe_of
from trimtab.tasks.typed import typed
from trimtab.train import Hardware, train
from trimtab.train.trained import load_trained, open_trained

CPU = Hardware(accelerator="cpu")
real = pytest.mark.skipif(not os.environ.get("TRIMTAB_DATA"), reason="TRIMTAB_DATA is not set")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tides(path: Path, num_steps: int = 1200, **cells: str) -> str:
    """Hours of two waves that move slowly through a day, with noise; `r5c1="x"` puts another cell there."""
    random = np.random.default_rng(0)
    hours = np.arange(num_steps)
    days = np.datetime64("2024-01-01T00") + hours
    level = np.sin(2 * np.pi * hours / 24.8) + 0.1 * random.standard_normal(num_steps)
    flow = 50 + 20 * np.cos(2 * np.pi * hours / 24.8) + 2 * random.standard_normal(num_steps)
    rows = [["date", "level", "flow"]]
    rows += [[str(day), f"{a:.4f}", f"{b:.3f}"] for day, a, b in zip(days, level, flow, strict=True)]
    for place, cell in cells.items():
        row, column = place.removeprefix("r").split("c")
        rows[int(row)][int(column)] = cell
    path.write_text("\n".join(",".join(row) for row in rows) + "\n")
    return str(path)


def recipe(data: str, **changes: object) -> ForecastingRecipe:
    small = ForecastingRecipe(
        data=data,
        model=ForecastModelConfig("samformer", lookback=48, horizon=12),
        optimizer="adam",
        lr=1e-2,
        batch_size=32,
        steps=6,
        watch_every=3,
        eval_every=3,
        watch=False,
    )
    return replace(small, **changes)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return tides(tmp_path / "tides.csv")


def test_metrics_are_those_of_all_windows_on_scaled_values(data: str, tmp_path: Path) -> None:
    made = recipe(data)
    result = train(made, tmp_path / "run", hardware=CPU)
    series = made.series()
    values, columns = series.values, series.columns
    assert columns == ("level", "flow")
    mean, sd = values[:, :840].mean(axis=1, keepdims=True), values[:, :840].std(axis=1, keepdims=True)
    scaled = torch.from_numpy((values - mean) / sd).float()
    torch.manual_seed(made.seed)
    model = made.task().model.eval()
    squared, absolute = [], []
    with torch.no_grad():
        for start in range(840, 960 - 12 + 1):  # one window after the other
            error = model(scaled[None, :, start - 48 : start])[0] - scaled[:, start : start + 12]
            squared.append(error.square().mean().item())
            absolute.append(error.abs().mean().item())
    assert result.initial["mse"] == pytest.approx(np.mean(squared), rel=1e-5)
    assert result.initial["mae"] == pytest.approx(np.mean(absolute), rel=1e-5)
    assert result.initial["eval_loss"] == result.initial["mse"]
    assert set(result.test) == {"eval_loss", "mse", "mae"}


def test_a_short_run_beats_the_last_value_and_the_last_season(data: str, tmp_path: Path) -> None:
    made = recipe(data, steps=120, eval_every=60, watch_every=60)
    parts = made.parts()
    assert parts.season == 24
    assert parts.test is not None
    season = measure(lambda x: last_season(x, 12, 24), parts.test)
    last = measure(lambda x: last_value(x, 12), parts.test)
    result = train(made, tmp_path / "run", hardware=CPU)
    assert result.test["mse"] < 0.8 * min(season["mse"], last["mse"])
    assert result.test["mae"] < 0.9 * min(season["mae"], last["mae"])


@pytest.mark.parametrize("stabilizer", ["sam:rho=0.5", "sigma", "sigma+sam:rho=0.1"])
def test_stabilizers_train_as_everywhere(data: str, tmp_path: Path, stabilizer: str) -> None:
    result = train(recipe(data, stabilizer=stabilizer, watch=True), tmp_path / "run", hardware=CPU)
    assert result.status == "finished"
    assert np.isfinite(list(result.test.values())).all()


def test_the_run_tells_what_was_found_and_how_to_use_the_model(data: str, tmp_path: Path) -> None:
    made = recipe(data, split=(700, 200, 300))
    train(made, tmp_path / "run", hardware=CPU)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["columns"] == ["level", "flow"]
    assert info["steps"] == {"train": 700, "validation": 200, "test": 300}
    assert info["windows"] == {"train": 641, "validation": 189, "test": 289}
    assert info["missing"] == {}
    assert (info["constant"], info["strange"], info["left_out"], info["uneven_steps"]) == ([], [], [], 0)
    assert recipe_of(info) == made
    content = json.loads((tmp_path / "run" / "files" / "series.json").read_text())
    values = made.series().values[:, :700]
    assert content["columns"] == ["level", "flow"]
    assert content["mean"] == pytest.approx(values.mean(axis=1))
    assert content["sd"] == pytest.approx(values.std(axis=1))
    assert content["frequency"] == {"count": 3_600_000_000, "unit": "microsecond", "day": None}
    assert content["sha256"] == hashlib.sha256(made.series().values[:, :900].tobytes()).hexdigest()
    trained = open_trained(tmp_path / "run", ForecastingRecipe)
    model = load_trained(trained, lambda: trained.recipe.make_model(len(content["columns"])))
    assert model(torch.zeros(3, 2, 48)).shape == (3, 2, 12)


def test_columns_are_chosen_by_name_and_the_model_has_as_many_channels(data: str) -> None:
    task = recipe(data, columns=("flow",)).task()
    x, y = task.train.batch(torch.arange(4), torch.Generator())
    assert x.shape == (4, 1, 48)
    assert task.model(x).shape == y.shape == (4, 1, 12)
    assert task.facts["columns"] == ["flow"]
    with pytest.raises(RecipeError, match=r"the model has 7 channels, and .*tides\.csv 2 columns: leave out"):
        recipe(data, model=ForecastModelConfig("samformer", 48, 12, channels=7)).task()


def test_missing_values_are_refused_or_filled_and_counted(tmp_path: Path) -> None:
    data = tides(tmp_path / "gaps.csv", r5c1="", r6c1="NA", r9c2="-9999")
    with pytest.raises(DataError, match="lacks values: 2 of column 'level'"):
        recipe(data).task()
    marked = recipe(data, missing="previous", missing_value=-9999.0).task()
    assert marked.facts["missing"] == {"level": 2, "flow": 1}
    x, _ = marked.train.batch(torch.arange(1), torch.Generator())
    assert x[0, 0, 3] == x[0, 0, 4] == x[0, 0, 5]
    assert x.abs().max() < 5
    unmarked = recipe(data, missing="previous").task()
    assert unmarked.facts["missing"] == {"level": 2}
    assert unmarked.train.batch(torch.arange(1), torch.Generator())[0].abs().max() > 20


def test_a_constant_column_is_trained_on_like_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tides(tmp_path / "flat.csv", **{f"r{row}c2": "0.3" for row in range(1, 1201)})
    result = train(recipe(data), tmp_path / "run", hardware=CPU)
    assert "constant over the training steps, and scaled by 1: flow" in caplog.text
    assert result.status == "finished"
    assert np.isfinite(result.test["mse"])


def test_series_that_fit_no_window_are_refused(tmp_path: Path) -> None:
    short = tides(tmp_path / "short.csv", num_steps=80)
    with pytest.raises(DataError, match=r"the training part of .* has 56 of its 80 steps, fewer than look-back"):
        recipe(short).task()
    twice = tides(tmp_path / "twice.csv", r5c0="2024-01-01T03")
    with pytest.raises(DataError, match="line 6: 2024-01-01 03:00:00 comes again after 2024-01-01 03:00:00"):
        recipe(twice).task()


def test_fields_that_fit_nothing_are_refused(data: str) -> None:
    with pytest.raises(RecipeError, match="shares that add up to 1"):
        recipe(data, split=(0.5, 0.1, 0.1))
    with pytest.raises(RecipeError, match=r"split must be tuple.* or None; got"):
        recipe(data, split=(0.5, 0.5))
    with pytest.raises(RecipeError, match="columns must name at least one"):
        recipe(data, columns=())
    with pytest.raises(RecipeError, match="the toy problem is no series"):
        recipe("toy", split=(0.8, 0.1, 0.1))
    with pytest.raises(RecipeError, match="missing must be one of refuse, previous; got 'drop'"):
        recipe(data, missing="drop")
    mixer = ForecastModelConfig("tsmixer", lookback=8, horizon=3)
    with pytest.raises(RecipeError, match="normalises over the windows of a batch: expected at least 2 in each of 4"):
        recipe(data, model=mixer, batch_size=4, accumulate=4)
    recipe(data, model=replace(mixer, window_norm="layer"), batch_size=4, accumulate=4)


@pytest.mark.parametrize("split", [(700, 200, 100), (0.5, 0.25, 0.25), None])
def test_a_split_survives_json(split: object) -> None:
    made = recipe("ETTh1", split=split)
    again = typed(ForecastingRecipe, json.loads(json.dumps(asdict(made))))
    assert again == made
    assert again.split == split
    assert [type(part) for part in again.split or ()] == [type(part) for part in split or ()]  # type: ignore[attr-defined]


def test_the_toy_problem_trains(tmp_path: Path) -> None:
    made = recipe("toy", model=ForecastModelConfig("dlinear", lookback=8, horizon=3), steps=3)
    result = train(made, tmp_path / "run", hardware=CPU)
    assert result.initial["mse"] > 2  # zero would have about 9
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["windows"] == {"train": 10_000, "validation": 5_000, "test": 2_000}
    assert info["bayes_mse"] == 1


@pytest.mark.parametrize(
    ("data", "horizon", "epoch"), [("ETTh1", 96, 251), ("ETTm1", 720, 1041), ("weather", 96, 1133)]
)
def test_an_epoch_of_the_protocol_has_the_steps_of_all_whole_batches(data: str, horizon: int, epoch: int) -> None:
    made = published(data, ForecastModelConfig("samformer", 512, horizon))
    assert made.steps == 100 * epoch
    assert made.eval_every == epoch
    assert made.restart_every == 5 * epoch
    assert made.patience == 5
    assert made.lr == (1e-4 if data == "weather" else 1e-3)
    assert (made.optimizer, made.batch_size, made.min_lr, made.stabilizer) == ("adam", 32, 1e-6, "none")
    assert published(data, made.model, seed=3, lr=0.01) == replace(made, seed=3, lr=0.01)


def test_what_has_no_published_protocol_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"there is no published protocol for 'mine\.csv': expected one of ETTh1"):
        published("mine.csv", ForecastModelConfig("samformer", 512, 96))
    with pytest.raises(RecipeError, match="national-illness has 676 training steps, too few for 32 windows"):
        published("national-illness", ForecastModelConfig("samformer", 512, 150))


@pytest.mark.parametrize("name", FORECASTING_RECIPES)
def test_recipes_make_models_for_their_columns(name: str) -> None:
    made = find_recipe(name)
    assert isinstance(made, ForecastingRecipe)
    channels = BENCHMARKS[made.data].columns if made.data in BENCHMARKS else 7
    model = made.make_model(channels)
    with torch.no_grad():
        assert model(torch.randn(2, channels, made.model.lookback)).shape == (2, channels, made.model.horizon)


@pytest.mark.data
@real
def test_windows_of_etth1_are_the_published_ones() -> None:
    parts = find_recipe("samformer-etth1").parts()  # type: ignore[attr-defined]
    assert parts.facts["windows"] == {"train": 8033, "validation": 2785, "test": 2785}
    assert parts.season == 24
