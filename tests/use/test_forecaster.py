"""`Forecaster`: frames in, frames out; what is refused, and that it is the engine's own training."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from trimtab.errors import CheckpointError, DataError, RecipeError, RunFolderError
from trimtab.models.forecasting import ForecastModelConfig
from trimtab.tasks.forecasting.forecasting_recipe import ForecastingRecipe
from trimtab.train import Hardware, train
from trimtab.train.trained import load_trained, open_trained
from trimtab.use import Forecaster

L, H = 16, 4
SMALL: dict[str, Any] = {"epochs": 2, "accelerator": "cpu"}


def tides(steps: int = 150, first: str = "2024-01-01", frequency: str = "h", zone: str | None = None) -> pd.DataFrame:
    """Two waves of other levels and spreads, whole numbers, and a column that never changes."""
    random = np.random.default_rng(0)
    wave = 2 * np.pi * np.arange(steps) / 12
    columns = {
        "level": np.sin(wave) + 0.1 * random.standard_normal(steps),
        "flow": 5000 + 200 * np.cos(wave) + 20 * random.standard_normal(steps),
        "count": random.integers(0, 9, steps),
        "flat": np.full(steps, 7.3),
    }
    return pd.DataFrame(columns, index=pd.date_range(first, periods=steps, freq=frequency, tz=zone, name="when"))


def in_polars(frame: pd.DataFrame) -> pl.DataFrame:
    return pl.from_pandas(frame.reset_index())


@pytest.fixture(scope="module")
def fitted() -> Forecaster:
    return Forecaster(L, H, **SMALL).fit(tides())


def test_forecasts_are_those_of_the_model_that_the_engine_trains(tmp_path: Path) -> None:
    frame = tides()[["level", "flow"]]
    forecaster = Forecaster(L, H, **SMALL, seed=3).fit(frame, 0.3, folder=tmp_path / "kept")
    run = tmp_path / "kept" / "run"
    trained = open_trained(run, ForecastingRecipe)
    assert (trained.recipe.rho, trained.recipe.seed, trained.recipe.split) == (0.7, 3, (105, 45, 0))
    again = train(replace(trained.recipe, rho=None, stabilizer="sam:rho=0.7"), tmp_path / "again", hardware=CPU)
    assert forecaster.metrics == {"mse": again.metrics["mse"], "mae": again.metrics["mae"]}
    model = load_trained(open_trained(tmp_path / "again", ForecastingRecipe), lambda: trained.recipe.make_model(2))
    values = frame.to_numpy().T
    mean, sd = values[:, :105].mean(1, keepdims=True), values[:, :105].std(1, keepdims=True)
    scaled = torch.from_numpy((values - mean) / sd).float()

    def expected(end: int) -> np.ndarray:
        with torch.no_grad():
            return model(scaled[None, :, end - L : end])[0].double().numpy() * sd + mean

    forecast = forecaster.predict(frame, level=0.8)
    np.testing.assert_allclose(forecast[["level", "flow"]].to_numpy().T, expected(150), rtol=1e-12)
    # of the 42 windows of the validation part the 35th smallest error: ceil(43 × 0.8)
    errors = [np.abs(expected(end) - values[:, end : end + H]) for end in range(105, 150 - H + 1)]
    margin = np.sort(errors, axis=0)[34]
    for place, name in enumerate(("level", "flow")):
        half = (forecast[f"{name}_upper"] - forecast[f"{name}_lower"]).to_numpy() / 2
        assert half == pytest.approx(margin[place], rel=1e-4)  # errors are float32, of values at their scale
        assert (forecast[f"{name}_upper"] + forecast[f"{name}_lower"]).to_numpy() / 2 == pytest.approx(
            forecast[name].to_numpy()
        )


CPU = Hardware(accelerator="cpu")


def test_a_forecast_looks_like_the_frame(fitted: Forecaster) -> None:
    frame = tides()
    assert fitted.columns == ("level", "flow", "count", "flat")
    made = fitted.predict(frame)
    assert list(made) == list(frame)
    assert made.index.equals(pd.date_range("2024-01-07 06:00", periods=H, freq="h"))
    assert made.index.name == "when"
    assert (made.dtypes == "float64").all()
    assert (made["flat"] == 7.3).all()
    assert made["flow"].between(4500, 5500).all()
    as_column = fitted.predict(frame.reset_index())
    pd.testing.assert_frame_equal(as_column, made.reset_index(), check_freq=False)
    other = fitted.predict(in_polars(frame), level=0.9)
    assert other.columns[:5] == ["when", *frame]
    assert other.columns[5:] == [f"{name}_{end}" for name in frame for end in ("lower", "upper")]
    assert_frame_equal(other[:, :5], in_polars(made), check_dtypes=True)
    assert (other["flat_lower"] == 7.3).all()
    assert (other["flow_lower"] < other["flow"]).all()


def test_columns_are_found_by_name(fitted: Forecaster) -> None:
    frame = tides()
    mixed = in_polars(frame).select("count", "flow", "when", "flat", "level")
    made = fitted.predict(mixed, level=0.5)
    assert made.columns[:5] == mixed.columns
    assert made.columns[5:7] == ["count_lower", "count_upper"]
    straight = fitted.predict(in_polars(frame), level=0.5)
    assert_frame_equal(made, straight.select(made.columns))


def test_only_the_last_rows_count(fitted: Forecaster) -> None:
    frame = tides()
    assert fitted.predict(frame[-L:]).equals(fitted.predict(frame))
    with pytest.raises(DataError, match="a forecast needs the last 16 steps, the look-back; there are 15"):
        fitted.predict(frame[-L + 1 :])


@pytest.mark.parametrize("stabilizer", [None, "sigma+qk-norm"])
def test_saved_and_loaded_it_forecasts_the_same(stabilizer: str | None, tmp_path: Path, fitted: Forecaster) -> None:
    frame = tides()
    if stabilizer is not None:
        fitted = Forecaster(L, H, **SMALL, stabilizer=stabilizer).fit(frame)
    fitted.save(tmp_path / "saved")
    loaded = Forecaster.load(tmp_path / "saved")
    pd.testing.assert_frame_equal(loaded.predict(frame, level=0.8), fitted.predict(frame, level=0.8), check_exact=True)
    assert (loaded.columns, loaded.metrics) == (fitted.columns, fitted.metrics)
    loaded.save(tmp_path / "saved")  # over itself
    loaded.save(tmp_path / "copy")
    for name in ("forecaster.json", "forecaster.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["forecaster.json", "forecaster.safetensors"]


def test_what_cannot_be_loaded_is_told(tmp_path: Path, fitted: Forecaster) -> None:
    with pytest.raises(CheckpointError, match=r"has no forecaster that can be read .* Forecaster\.save writes one"):
        Forecaster.load(tmp_path)
    fitted.save(tmp_path)
    tensors = (tmp_path / "forecaster.safetensors").read_bytes()
    (tmp_path / "forecaster.safetensors").write_bytes(tensors[:-10])
    with pytest.raises(CheckpointError, match="is damaged"):
        Forecaster.load(tmp_path)
    (tmp_path / "forecaster.json").write_text('{"format": "other"}')
    with pytest.raises(CheckpointError, match=r"is damaged: expected the format trimtab\.forecaster\.2"):
        Forecaster.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot write to"):
        fitted.save(tmp_path / "file")


def test_a_forecaster_that_was_changed_by_hand_is_refused(fitted: Forecaster, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    path = tmp_path / "forecaster.json"
    whole = path.read_text()
    assert '"level",' in whole
    for changed in (
        whole.replace("0.0", "1.0", 1),
        whole.replace('"level",\n', "", 1),
        whole.replace("level", "flow!"),
    ):
        assert changed != whole
        path.write_text(changed)
        with pytest.raises(CheckpointError, match=r"is damaged: forecaster\.json is not what was written"):
            Forecaster.load(tmp_path)


def test_home_is_expanded(fitted: Forecaster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fitted.save("~/kept")
    assert (tmp_path / "kept" / "forecaster.json").is_file()
    assert Forecaster.load("~/kept").columns == fitted.columns


def test_files_of_two_saves_do_not_go_together(fitted: Forecaster, tmp_path: Path) -> None:
    """As a kill between the two leaves them, or a disk that changes a bit."""
    fitted.save(tmp_path)
    Forecaster(L, H, **SMALL, seed=1).fit(tides()).save(tmp_path / "other")
    tensors = tmp_path / "forecaster.safetensors"
    whole = tensors.read_bytes()
    for wrong in ((tmp_path / "other" / tensors.name).read_bytes(), whole[:-1] + bytes([whole[-1] ^ 1])):
        tensors.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=r"is damaged: forecaster\.json and .* are not of one save"):
            Forecaster.load(tmp_path)
    tensors.write_bytes(whole)
    assert Forecaster.load(tmp_path).predict(tides()).equals(fitted.predict(tides()))


def test_a_frame_that_follows_is_as_good_as_a_share(fitted: Forecaster) -> None:
    frame = tides()
    later = in_polars(frame[120:]).select("flat", "when", "flow", "level", "count")
    made = Forecaster(L, H, **SMALL).fit(frame[:120], later)
    assert made.metrics == fitted.metrics
    assert made.predict(frame, 0.9).equals(fitted.predict(frame, 0.9))
    with pytest.raises(DataError, match="begins at 2024-01-05 23:00:00, and the frame ends at 2024-01-05 23:00:00"):
        Forecaster(L, H, **SMALL).fit(frame[:120], frame[119:])
    with pytest.raises(DataError, match="the validation frame lacks 'flow'"):
        Forecaster(L, H, **SMALL).fit(frame[:120], frame[120:].drop(columns="flow"))


def test_with_a_folder_the_same_call_goes_on_and_another_series_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, steps = tides()[["level", "count"]], []
    first = Forecaster(L, H, **SMALL).fit(frame, folder=tmp_path, on_step=lambda now: steps.append(now.step))
    assert steps
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    home = f"~/{tmp_path.name}"  # the same one
    again = Forecaster(L, H, **SMALL).fit(frame, folder=home, on_step=lambda now: steps.append(-1))
    assert -1 not in steps
    assert again.predict(frame).equals(first.predict(frame))
    with pytest.raises(RunFolderError, match="holds another series: choose another folder"):
        Forecaster(L, H, **SMALL).fit(frame + 1e-9, folder=tmp_path)
    with pytest.raises(RunFolderError, match=r"with another learning rate, 0\.001 there and 0\.01 here"):
        Forecaster(L, H, **SMALL, lr=0.01).fit(frame, folder=tmp_path)


@pytest.mark.parametrize(
    ("first", "frequency", "zone"),
    [
        ("2024-01-31", "ME", None),
        ("2024-01-15", "MS", None),
        ("2020-01-01", "QE", None),
        ("2024-01-01", "B", None),
        ("2024-01-01", "15min", None),
        ("2024-03-28", "h", "America/New_York"),
        ("2023-12-05", "D", "Europe/Berlin"),  # its 120th day is after the clocks change
    ],
)
def test_times_go_on_as_they_were(fitted: Forecaster, first: str, frequency: str, zone: str | None) -> None:
    """The frequency is found while fitting: let an engine that trains nothing stand in for the model."""
    times = pd.date_range(first, periods=124, freq=frequency, tz=zone)
    frame = tides(120).set_index(times[:120].rename("when"))
    made = refitted(fitted, frame).predict(frame)
    assert made.index.equals(times[120:])
    assert made.index.dtype == times.dtype
    assert refitted(fitted, in_polars(frame)).predict(in_polars(frame))["when"].to_list() == times[120:].to_list()


def refitted(fitted: Forecaster, frame: Any) -> Forecaster:
    """A forecaster that knows of a frame what a fit finds out of it, with the model of another one."""
    from trimtab.use.frames import read_frame, series_of
    from trimtab.use.steady_series import check_frequency

    series, local = series_of(read_frame(frame))
    facts, model = fitted._known()
    made = Forecaster(L, H, **SMALL)
    made._fitted = replace(facts, frequency=check_frequency(series), local=local), model
    return made


def test_dates_stay_dates(fitted: Forecaster) -> None:
    frame = in_polars(tides(frequency="D")).with_columns(pl.col("when").cast(pl.Date))
    made = refitted(fitted, frame).predict(frame)
    assert made["when"].dtype == pl.Date
    assert str(made["when"][0]) == "2024-05-30"


@pytest.mark.parametrize(
    ("first", "zone", "expected"),
    [
        ("2023-11-02 02:30", "Europe/Berlin", "2024-03-31 03:30:00+02:00"),  # 02:30 does not exist
        ("2023-11-28", "Africa/Cairo", "2024-04-26 01:00:00+03:00"),  # nor this midnight
        ("2024-05-30 02:30", "Europe/Berlin", "2024-10-27 02:30:00+02:00"),  # and this comes twice
    ],
)
def test_times_that_the_zone_skips_come_later(first: str, zone: str, expected: str, fitted: Forecaster) -> None:
    frame = tides(frequency="D", first=first, zone=zone)
    for given in (frame, in_polars(frame)):
        made = refitted(fitted, given).predict(given)
        times = made.index if given is frame else made["when"]
        assert str(times[0]) == expected
        assert (times[1].hour, times[1].minute) == (frame.index[0].hour, frame.index[0].minute)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York"])
@pytest.mark.parametrize("frequency", ["D", "MS", "7D"])
def test_midnights_in_utc_stay_so_whatever_zone_shows_them(zone: str, frequency: str, fitted: Forecaster) -> None:
    times = pd.date_range("2023-10-01", periods=154, freq=frequency, tz="UTC").tz_convert(zone)
    frame = tides(150).set_index(times[:150].rename("when"))
    made = refitted(fitted, frame).predict(frame)
    assert made.index.equals(times[150:])
    assert made.index.dtype == times.dtype


def test_days_without_a_change_of_clocks_are_those_of_which_they_are_midnights(fitted: Forecaster) -> None:
    for zone in ("UTC", "Europe/Berlin"):
        times = pd.date_range("2023-11-02", periods=154, freq="D", tz=zone)[:148].tz_convert("Europe/Berlin")
        frame = tides(144).set_index(times[:144].rename("when"))
        made = refitted(fitted, frame).predict(frame)
        assert made.index.tz_convert(zone).equals(times[144:148].tz_convert(zone))
        later = tides(20).set_index(pd.date_range("2024-03-12", periods=20, freq="D", tz=zone, name="when"))
        later = later.tz_convert("Europe/Berlin")  # its last day is the 31st, when clocks change
        made = refitted(fitted, frame).predict(later)
        assert made.index[0] == pd.Timestamp("2024-04-01", tz=zone)


@pytest.mark.parametrize("day", [28, 29, 30, 31])
def test_the_same_day_of_each_month_is_even_whatever_its_length(day: int, fitted: Forecaster) -> None:
    months = pd.period_range("2012-01", periods=154, freq="M")
    times = pd.DatetimeIndex([pd.Timestamp(m.year, m.month, min(day, m.days_in_month), 6) for m in months])
    for last in (148, 149, 150):  # from a February on, and others
        frame = tides(last).set_index(times[:last].rename("when"))
        assert refitted(fitted, frame).predict(frame).index.tolist() == times[last : last + H].tolist()


def test_a_missing_time_is_told_whatever_the_unit(fitted: Forecaster) -> None:
    frame = tides().reset_index().astype({"when": "datetime64[ns]"})
    frame.loc[7, "when"] = pd.NaT
    with pytest.raises(DataError, match="has 1 rows without a time: leave them out"):
        fitted.predict(frame)


def test_times_finer_than_a_microsecond_are_told(fitted: Forecaster) -> None:
    frame = tides().set_axis(pd.date_range("2024", periods=150, freq="1500ns", name="when"), axis=0)
    with pytest.raises(DataError, match=r"row 1: .* is not a whole number of microseconds"):
        Forecaster(L, H, **SMALL).fit(frame)


@pytest.mark.parametrize("size", [1e20, -9.96921e36, 1e100])
def test_values_too_far_from_all_others_are_told(
    size: float, fitted: Forecaster, caplog: pytest.LogCaptureFixture
) -> None:
    """As the marks for missing values of some formats: their squares are infinite."""
    frame = tides()
    for place in (0, 145):  # of training, where the scale is theirs, and of validation
        wrong = frame.copy()
        wrong.iloc[place, 0] = size
        caplog.clear()
        if place == 0:
            Forecaster(L, H, **SMALL).fit(wrong)
            assert "columns that have values 1e+09 times as large as is usual in them, beside which" in caplog.text
            assert caplog.text.rstrip().endswith(": level")
        else:
            with pytest.raises(
                DataError, match=r"has a value of -?[0-9.e+]+ in column 'level', .* standard deviations"
            ):
                Forecaster(L, H, **SMALL).fit(wrong)
            with pytest.raises(DataError, match=r"in column 'level', [0-9.e+]+ standard dev.* missing value, say so"):
                fitted.predict(wrong)


def test_a_column_constant_but_for_rounding_is_constant(caplog: pytest.LogCaptureFixture) -> None:
    frame = tides().assign(flat=[0.1 + 0.2, 0.3] * 75)
    frame.loc[frame.index[130] :, "flat"] = 5.0
    made = Forecaster(L, H, **SMALL).fit(frame)
    assert "constant over the training steps, and scaled by 1: flat" in caplog.text
    assert made.metrics["mse"] < 100
    np.testing.assert_allclose(made.predict(frame)["flat"], 5.0, rtol=1e-6)


def test_a_short_look_back_may_have_a_holiday(fitted: Forecaster, caplog: pytest.LogCaptureFixture) -> None:
    times = pd.bdate_range("2024-01-01", periods=154)
    frame = tides(150).set_index(times[:150].rename("when"))
    forecaster = Forecaster(5, 2, **SMALL).fit(frame.drop(frame.index[147]))
    with caplog.at_level(logging.WARNING, "trimtab"):
        made = forecaster.predict(frame.drop(frame.index[147]))
        forecaster.predict(frame.drop(frame.index[147])[-5:])
    assert made.index.equals(times[150:152])
    assert caplog.messages[-1] == "the frame: steps longer or shorter than 1 business day, which count like it: 1"
    hours = tides(200)
    slower = tides(12).set_axis(pd.date_range(hours.index[-1], periods=13, freq="D", name="when")[1:], axis=0)
    with pytest.raises(DataError, match="are not evenly apart: 4 of 4 steps"):
        Forecaster(5, 2, **SMALL).fit(hours).predict(pd.concat([hours, slower]))
    days = tides(154).set_index(pd.date_range("2024-01-01", periods=154, name="when"))
    with pytest.raises(DataError, match="are not evenly apart: 1 of 4 steps"):
        forecaster.predict(days[:-1])  # to a Saturday
    with pytest.raises(DataError, match="are not evenly apart"):
        fitted.predict(tides().set_axis(pd.date_range("2024", periods=150, freq="3h", name="when"), axis=0))


def test_what_is_drawn_here_changes_nothing_of_the_caller(fitted: Forecaster, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Forecaster(L, H, **SMALL).fit(tides())
    fitted.save(tmp_path)
    Forecaster.load(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_the_default_dtype_is_that_of_training(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        forecaster = Forecaster(L, H, **SMALL).fit(tides())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weight.dtype for weight in forecaster._known()[1].model.parameters()} == {torch.float64}
    forecaster.save(tmp_path)
    assert Forecaster.load(tmp_path).predict(tides()).equals(forecaster.predict(tides()))
    assert forecaster.predict(tides())["flow"].between(4000, 6000).all()


FRAMES: dict[str, tuple[Callable[[pd.DataFrame], Any], str]] = {
    "no frame": (lambda frame: frame.to_numpy(), "the frame is a ndarray; expected a DataFrame of pandas, polars"),
    "lazy": (lambda frame: in_polars(frame).lazy(), r"is a LazyFrame; .* collected first: frame\.collect\(\)"),
    "no times": (lambda frame: frame.reset_index(drop=True), "has no times: expected a column of dates, or a Datet"),
    "text": (lambda frame: frame.reset_index().astype({"when": str}), "has dates as text in column 'when': turn them"),
    "objects": (
        lambda frame: frame.reset_index(drop=True).assign(day=[time.date() for time in frame.index]),
        "has dates as objects in column 'day': turn them into times, by pandas",
    ),
    "periods": (lambda frame: frame.to_period("h"), r"has no times: .* pandas makes of periods by \.to_timestamp\(\)"),
    "huge": (lambda frame: frame * 1e200, r"has values beyond 1e\+150: 1[56]0? of column 'level', .* in a larger unit"),
    "two times": (
        lambda frame: frame.reset_index().assign(t=frame.index),
        "has 2 columns of times, when, t: leave one",
    ),
    "words": (
        lambda frame: frame.assign(kind="x", good=True),
        r"2 columns that hold no numbers: 'kind' \(String\), 'go",
    ),
    "numbered": (lambda frame: frame.rename(columns={"flow": 3}), "has a column named 3; expected text of one line"),
    "spaces": (lambda frame: frame.rename(columns={"flow": "a\nb"}), r"has a column named 'a\\nb'; expected text"),
    "twice": (lambda frame: frame.rename(columns={"flow": "level"}), "has more than one column of one name"),
    "empty": (lambda frame: frame[:0], "the frame has 0 rows and 4 columns of numbers: nothing to see"),
    "no columns": (lambda frame: frame[[]], "rows and 0 columns of numbers: nothing to see"),
    "unsorted": (lambda frame: frame[::-1], r"row 1: 2024-01-07 04:00:00 comes before 2024-01-07 05:00:00 \(149 such"),
    "again": (lambda frame: frame.iloc[[*range(9), *range(8, 150)]], r"row 9: 2024-01-01 08:00:00 comes again after"),
    "no time": (
        lambda frame: in_polars(frame).with_columns(when=pl.col("when").replace(frame.index[3], None)),
        "1 rows w",
    ),
    "NaN": (
        lambda frame: frame.replace(7.3, np.nan),
        r"lacks values: \d+ of column 'flat'\. Fill .* missing=.previous",
    ),
    "null": (
        lambda frame: in_polars(frame).with_columns(pl.col("count").replace(3, None)),
        r"lacks values: \d+ of column 'count'",
    ),
    "inf": (lambda frame: frame.replace(7.3, np.inf), "has infinite values: [0-9]+ of column 'flat'"),
    "uneven": (lambda frame: frame[np.arange(150) % 4 < 2], r"are not evenly apart: \d+ of \d+ steps are longer or sh"),
    "one column more": (
        lambda frame: frame.assign(wind=1.0),
        "has 'wind' besides; expected the 4 columns of the fit, in",
    ),
    "one column less": (lambda frame: frame.drop(columns="flow"), r"the frame lacks 'flow'; .* \(exogenous columns\)"),
    "another": (lambda frame: frame.rename(columns={"flow": "flux"}), "the frame lacks 'flow' and has 'flux' besides"),
}


@pytest.mark.parametrize("what", FRAMES)
def test_a_frame_that_cannot_be_used_is_refused(what: str, fitted: Forecaster) -> None:
    wrong, message = FRAMES[what]
    frame = wrong(tides())
    with pytest.raises(DataError, match=message):
        fitted.predict(frame)
    if what not in ("one column more", "one column less", "another"):
        with pytest.raises(DataError, match=message):
            Forecaster(L, H, **SMALL).fit(frame)


def test_another_frequency_is_refused_and_a_gap_is_told(fitted: Forecaster, caplog: pytest.LogCaptureFixture) -> None:
    frame = tides()
    with pytest.raises(DataError, match="15 of 15 steps are longer or shorter than 1:00:00"):
        fitted.predict(frame.set_axis(pd.date_range("2024", periods=150, freq="2h"), axis=0))
    with caplog.at_level(logging.WARNING, "trimtab"):
        made = fitted.predict(frame.drop(frame.index[-8]))
    assert caplog.messages == ["the frame: steps longer or shorter than 1:00:00, which count like it: 1"]
    assert made.index[0] == pd.Timestamp("2024-01-07 06:00")


def test_what_is_told_while_fitting_is_of_the_frame(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    frame = tides()
    with caplog.at_level(logging.WARNING, "trimtab"):
        Forecaster(L, H, **SMALL).fit(frame.drop(frame.index[50]))
    assert caplog.messages == [
        "the frame: columns that are constant over the training steps, and scaled by 1: flat",
        "the frame: steps longer or shorter than the others, which count like them: 1",
    ]


def test_sizes_of_values_do_not_matter(fitted: Forecaster) -> None:
    """Of the same shape, at 1e12, at 1e-12, or a small one upon a large level; so small that squares are zero."""
    frame = tides()
    scaled = frame.assign(level=frame["level"] * 1e12, flow=frame["flow"] * 1e-12)
    made = Forecaster(L, H, **SMALL).fit(scaled).predict(scaled)
    expected = fitted.predict(frame)
    np.testing.assert_allclose(made["level"] * 1e-12, expected["level"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(made["flow"] * 1e12, expected["flow"], rtol=1e-3)
    high = frame.assign(count=frame["count"] + 10**12)
    assert Forecaster(L, H, **SMALL).fit(high).predict(high)["count"].between(1e12 - 20, 1e12 + 20).all()
    low = frame.assign(level=frame["level"] * 1e-200)
    assert Forecaster(L, H, **SMALL).fit(low).predict(low)["level"].abs().max() < 1e-199


def test_exogenous_columns_are_refused(fitted: Forecaster) -> None:
    frame: Any = tides()
    with pytest.raises(DataError, match="exog cannot be used: no model here takes exogenous columns"):
        Forecaster(L, H, **SMALL).fit(frame, exog=frame)
    with pytest.raises(DataError, match="future cannot be used"):
        fitted.predict(frame, future=frame)


def test_missing_values_become_the_last_before_if_asked(tmp_path: Path) -> None:
    frame = tides().astype({"count": "float64"})
    frame.iloc[[5, 90, 148], 2] = np.nan
    frame.iloc[-L:, 0] = np.nan  # the last that is known lies before what the model sees
    filled = frame.ffill()
    made = Forecaster(L, H, **SMALL, missing="previous").fit(frame)
    assert made.predict(frame).equals(made.predict(filled))
    assert made.predict(in_polars(frame).fill_nan(None)).equals(in_polars(made.predict(filled)))
    assert made.metrics == Forecaster(L, H, **SMALL).fit(filled).metrics
    # of a forecaster that refuses, those before what it sees do no harm
    refusing = Forecaster(L, H, **SMALL)
    refusing._fitted = made._known()
    early = filled.copy()
    early.iloc[20, 1] = np.nan
    assert refusing.predict(early).equals(made.predict(filled))


def test_a_series_that_is_too_short_is_refused() -> None:
    frame = tides()
    with pytest.raises(
        DataError, match=r"19 training steps make 0 windows of look-back 16 \+ horizon 4; expected 1 or m"
    ):
        Forecaster(L, H, **SMALL).fit(frame[:24])
    with pytest.raises(DataError, match="the validation part has 3 steps, fewer than the horizon, 4: give a larger"):
        Forecaster(L, H, **SMALL).fit(frame, 0.02)
    with pytest.raises(DataError, match=r"50 training steps make 31 windows .* expected 32 or more"):
        Forecaster(L, H, **SMALL, batch_size=32).fit(frame[:100], 0.5)
    with pytest.raises(DataError, match="the frame has a single time"):
        Forecaster(L, H, **SMALL).fit(frame[:1])


def test_norms_over_a_batch_get_two_windows_or_are_refused() -> None:
    frame = tides()[:40]  # so few windows that a step would have one
    assert len(Forecaster(8, 3, model="tsmixer", epochs=1).fit(frame).predict(frame)) == 3
    with pytest.raises(DataError, match=r"make 1 windows of .* expected 2 or more"):
        Forecaster(8, 3, model="tsmixer", epochs=1).fit(tides()[:14])
    with pytest.raises(RecipeError, match="normalises over the windows of a batch"):
        Forecaster(8, 3, model="tsmixer", batch_size=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 0}, "horizon must be at least 1"),
        ({"horizon": "4"}, "^horizon must be a whole number; got '4'"),
        ({"horizon": True}, "^horizon must be a whole number; got True"),
        ({"lookback": 2.5}, "^lookback must be a whole number; got 2.5"),
        (
            {"model": "arima"},
            "model must be one of samformer, transformer, tsmixer, dlinear, itransformer; got 'arima'",
        ),
        ({"stabilizer": "sma"}, "sma"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"missing": "drop"}, "missing must be one of refuse, previous"),
        ({"accelerator": "tpu"}, "accelerator must be one of auto, cpu, gpu"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Forecaster(**{"lookback": L, "horizon": H, **settings})


def test_shares_and_levels_are_checked(fitted: Forecaster) -> None:
    frame = tides()
    assert Forecaster(L, H, **SMALL).fit(frame, np.float32(0.2)).metrics == fitted.metrics
    for share in (0, 1, -0.1, 30, np.float32(2)):
        with pytest.raises(RecipeError, match="valid must be a share between 0 and 1, or a frame that follows"):
            Forecaster(L, H, **SMALL).fit(frame, share)
    with pytest.raises(RecipeError, match="level must be above 0 and below 1"):
        fitted.predict(frame, level=90)
    with pytest.raises(RecipeError, match=r"level must be above 0 and below 1, as 0\.9 is; got '0\.9'"):
        fitted.predict(frame, level="0.9")  # type: ignore[arg-type]  # that is what is refused
    with pytest.raises(
        RecipeError, match=r"a level of 0\.99 needs at least 99 windows of validation, and there are 27"
    ):
        fitted.predict(frame, level=0.99)
    clashing = tides().rename(columns={"count": "level_lower"})
    with pytest.raises(DataError, match="there is a column 'level_lower', which would be the bound of an interval"):
        Forecaster(L, H, **SMALL | {"epochs": 1}).fit(clashing).predict(clashing, level=0.5)


def test_before_a_fit_there_is_nothing(tmp_path: Path) -> None:
    made = Forecaster(L, H)
    for use in (lambda: made.predict(tides()), lambda: made.save(tmp_path), lambda: made.columns, lambda: made.metrics):
        with pytest.raises(RecipeError, match=r"nothing fitted yet: call fit\(frame\), or Forecaster\.load\(folder\)"):
            use()


@pytest.mark.parametrize("model", ["dlinear", ForecastModelConfig("tsmixer", dim=4, depth=1)])
def test_other_models(model: Any, tmp_path: Path) -> None:
    frame = tides()
    made = Forecaster(L, H, model=model, **SMALL).fit(frame, folder=tmp_path)
    recipe = open_trained(tmp_path / "run", ForecastingRecipe).recipe
    assert (recipe.stabilizer, recipe.rho, recipe.model.lookback, recipe.model.horizon) == ("none", None, L, H)
    assert (made.predict(frame)["flat"] == 7.3).all()  # also where no RevIN keeps it


def test_training_that_diverges_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"training diverged at step .*: take a lower lr than 1e"):
        Forecaster(L, H, model="dlinear", lr=1e30, **SMALL).fit(tides())


def test_many_windows_are_drawn_from(monkeypatch: pytest.MonkeyPatch, fitted: Forecaster) -> None:
    frame = tides()
    monkeypatch.setattr("trimtab.use.fitted_forecast._WINDOWS", 9)
    made = Forecaster(L, H, **SMALL).fit(frame)
    few, all_of_them = made._known()[1].errors, fitted._known()[1].errors
    assert few.shape == (9, 4, H)
    assert all_of_them.shape == (27, 4, H)
    rows = {row.tobytes() for row in all_of_them.round(5)}
    assert sum(row.tobytes() in rows for row in few.round(5)) == 9


def test_what_the_document_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "forecasting.md").read_text(encoding="utf8")
    code = page.partition("### From Python")[2].partition("```python\n")[2].partition("```")[0]
    assert "lookback=168, horizon=24" in code
    monkeypatch.chdir(tmp_path)
    tides().rename_axis("date").to_csv("my-hours.csv")
    exec(code.replace("lookback=168, horizon=24", f"lookback={L}, horizon={H}, epochs=1"), {})
    assert (tmp_path / "load-forecaster" / "forecaster.json").is_file()
