"""`trimtab forecast`: a file in, a table and a picture of its next steps out."""

import csv
import gzip
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.cli import main
from trimtab.tasks.forecasting.forecasting_recipe import ForecastingRecipe
from trimtab.tasks.forecasting.naive import last_season, last_value, measure
from trimtab.tasks.forecasting.series import Series
from trimtab.tasks.forecasting.timestamps import Frequency
from trimtab.train.trained import open_trained
from trimtab.use.fitted_forecast import named_forecast
from trimtab.use.forecast import lookback_for
from trimtab.use.forecast_files import draw_forecast, write_table
from trimtab.use.forecast_scores import aligned, by_column, overall, scores_of

real = pytest.mark.skipif(not os.environ.get("TRIMTAB_DATA"), reason="TRIMTAB_DATA is not set")
CPU = ["--accelerator", "cpu"]


def write_tides(path: Path, steps: int = 300, dates: bool = True, columns: int = 2) -> str:
    """Hours of waves that repeat after a day, with noise."""
    random = np.random.default_rng(0)
    hours = np.arange(steps)
    waves = [
        place * 50 + 10 * np.sin(2 * np.pi * hours / 24 + place) + random.standard_normal(steps)
        for place in range(columns)
    ]
    first = np.datetime_as_string(np.datetime64("2024-01-01T00") + hours) if dates else None
    with path.open("w") as file:
        print(*(["date"] if dates else []), *(f"tide{place}" for place in range(columns)), sep=",", file=file)
        for step in hours:
            cells = [f"{wave[step]:.4f}" for wave in waves]
            print(*([first[step]] if first is not None else []), *cells, sep=",", file=file)
    return str(path)


def rows_of(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run's folder, and the words of its command."""
    folder = tmp_path_factory.mktemp("forecast")
    data = write_tides(folder / "tides.csv")
    words = ["forecast", data, "--horizon", "6", "--epochs", "2", "--folder", str(folder / "run"), *CPU]
    assert main(words) == 0
    return folder / "run", words


def test_it_writes_the_next_steps_and_a_picture(done: tuple[Path, list[str]]) -> None:
    folder, _ = done
    made = ["dlinear", "forecast.csv", "forecast.png", "samformer", "scores.csv"]
    assert sorted(path.name for path in folder.iterdir()) == made
    header, rows = rows_of(folder / "forecast.csv")
    bounds = [f"tide{place}_{end}" for place in (0, 1) for end in ("lower", "upper")]
    assert header == ["date", "tide0", "tide1", *bounds]
    assert [row[0] for row in rows] == [f"2024-01-13 {hour:02}:00:00" for hour in range(12, 18)]
    values = np.array([row[1:] for row in rows], float)
    assert (np.abs(values[:, 0]) < 15).all()
    assert (np.abs(values[:, 1] - 50) < 15).all()
    assert (values[:, 4] < values[:, 1]).all()
    assert (values[:, 1] < values[:, 5]).all()
    picture = (folder / "forecast.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_it_prints_errors_of_the_same_windows_for_all_and_goes_on(
    done: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = done
    table = (folder / "forecast.csv").read_bytes()
    (folder / "forecast.csv").unlink()
    assert main(words) == 0  # with the runs that are there
    assert (folder / "forecast.csv").read_bytes() == table
    printed = capsys.readouterr().out
    assert "300 steps, 1:00:00 apart, of 2 columns\nlook-back 48 (chosen), horizon 6\n" in printed
    recipe = open_trained(folder / "samformer", ForecastingRecipe).recipe
    other = open_trained(folder / "dlinear", ForecastingRecipe).recipe
    assert (recipe.stabilizer, other.stabilizer, other.model.kind) == ("sam:rho=0.7", "none", "dlinear")
    alike = {"model": other.model, "stabilizer": "none", "rho": None, "watch": False}
    assert replace(recipe, **alike) == other  # trained the same way
    parts = recipe.parts()
    assert parts.test is not None
    expected = {
        "last value": measure(lambda x: last_value(x, 6), parts.test),
        "last season": measure(lambda x: last_season(x, 6, 24), parts.test),
        **{
            name: json.loads((folder / run / "result.json").read_text())["test"]
            for name, run in (("DLinear", "dlinear"), ("SAMformer", "samformer"))
        },
    }
    lines = [line for line in printed.splitlines() if line.startswith(tuple(expected)) and "trained" not in line]
    for line, (name, metrics) in zip(lines, expected.items(), strict=True):
        assert line.removeprefix(name).split() == [f"{metrics['mse']:.4f}", f"{metrics['mae']:.4f}"]
    assert f"SAMformer is trained already, in {folder / 'samformer'}\n" in printed
    assert f"DLinear is trained already, in {folder / 'dlinear'}\n" in printed
    header, rows = rows_of(folder / "scores.csv")
    assert header == ["forecast", "column", "mse", "mae", "scaled_mse", "scaled_mae"]
    for name, metrics in expected.items():
        own = np.array([row[4:] for row in rows if row[0] == name], float)
        np.testing.assert_allclose(own.mean(axis=0), [metrics["mse"], metrics["mae"]], rtol=1e-5)
    best = min(expected, key=lambda name: expected[name]["mse"])
    assert best == "last season"
    assert "the lowest MSE is not that of SAMformer, which forecasts, but last season's" in printed
    arms = [json.loads((folder / run / "run.json").read_text())["arm"] for run in ("samformer", "dlinear")]
    assert arms == ["SAMformer", "DLinear"]
    assert "MAE, in its units" in printed
    held = float(printed.partition("its intervals of level 0.9 hold ")[2].split()[0])
    assert 0.6 < held <= 1


def test_scores_are_those_of_each_column_in_its_units() -> None:
    from trimtab.tasks.forecasting.splits import Scaler
    from trimtab.tasks.forecasting.windows import windows

    values = torch.arange(10.0).repeat(2, 1) * torch.tensor([[1.0], [3.0]])
    test = windows(values, 4, 10, 2, 2)
    scores = scores_of(lambda x: last_value(x, 2), test, np.array([[1.0, 2.0], [3.0, 5.0]]))
    assert scores.mae.tolist() == [1.5, 4.5]  # of errors 1 and 2, and 3 and 6
    assert scores.mse.tolist() == [2.5, 22.5]
    assert scores.held == 0.75
    assert scores_of(lambda x: last_value(x, 2), test).held is None
    scaler = Scaler(np.zeros(2), np.array([10.0, 0.1]), np.zeros(2, bool))
    assert overall({"it": scores}).splitlines() == ["        MSE     MAE", "it  12.5000  3.0000"]
    table = by_column({"it": scores}, ["a", "b"], scaler).splitlines()
    assert [line.split()[-1] for line in table if line] == ["it", "15", "0.45", "it", "250", "0.225"]
    assert aligned([["", "x"], ["long", "1.5"]]) == "        x\nlong  1.5"


def test_without_dates_steps_are_counted_and_without_a_level_there_are_no_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tides(tmp_path / "tides.csv", dates=False, columns=9)
    words = [data, "--horizon", "3", "--lookback", "8", "--epochs", "1", "--level", "None", "--columns"]
    columns = [f"tide{place}" for place in range(8, -1, -1)]
    assert main(["forecast", *words, *columns, "--folder", str(tmp_path / "run"), *CPU]) == 0
    header, rows = rows_of(tmp_path / "run" / "forecast.csv")
    assert header == ["step", *columns]
    assert [row[0] for row in rows] == ["301", "302", "303"]
    printed = capsys.readouterr().out
    assert "look-back 8, horizon 3" in printed
    assert "(no last season: no season is known)" in printed
    assert "MAE, in its units" not in printed  # of so many columns
    assert "intervals" not in printed


@pytest.mark.parametrize("steps", [1, 2, 24, 60, 96, 100, 365, 1500])
@pytest.mark.parametrize(
    "frequency",
    [
        *map(Frequency, (1_000_000, 900_000_000, 3_600_000_000, 86_400_000_000)),
        Frequency(1, "business day"),
        Frequency(1, "month"),
        Frequency(12, "month end"),
    ],
)
def test_a_picture_has_ticks_whatever_the_span(frequency: Frequency, steps: int, tmp_path: Path) -> None:
    """Warnings are errors here: matplotlib's when no tick fits. Its years end at 9999."""
    past = frequency.after(np.datetime64("1990-01-31"), 3 * steps + 24)
    values = np.arange(float(len(past)))[None]
    series = Series("it", values, ("a",), past, frequency)
    ahead = frequency.after(past[-1], steps)
    draw_forecast(tmp_path / "it.png", series, ahead, values[:, :steps], values[:, :steps] + 1, 0.9)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_told_of_a_file_is_told_once_and_zones_are_kept_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    lines = Path(write_tides(tmp_path / "tides.csv")).read_text().splitlines()
    lines = [lines[0] + ",place,flat", *(line.replace(",", ":00+01:00,", 1) + ",Kiel,7.3" for line in lines[1:])]
    lines[9] = lines[9].replace(lines[9].split(",")[1], "", 1)
    del lines[20]
    data = tmp_path / "tides.csv.gz"
    data.write_bytes(gzip.compress("\n".join(lines).encode()))
    words = [str(data), "--horizon", "1", "--epochs", "1", "--missing", "previous", *CPU]
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "trimtab"):
        patch.chdir(tmp_path)
        assert main(["forecast", *words]) == 0
    assert caplog.messages == [
        f"{data}: columns that hold no numbers to forecast, and are left out: place",
        f"{data}: columns that are constant over the training steps, and scaled by 1: flat",
        f"{data}: steps longer or shorter than the others, which count like them: 1",
        f"{data}: missing values, which take the last value before: 1 of column 'tide0'",
    ]
    assert "299 steps, 1:00:00 apart, of 3 columns" in capsys.readouterr().out
    rows = rows_of(tmp_path / "runs" / "forecast-tides-1" / "forecast.csv")[1]
    assert rows[0][0] == "2024-01-13 11:00:00+00:00"
    assert rows[0][3] == "7.3"


def test_a_table_has_digits_for_small_changes_of_large_values(tmp_path: Path) -> None:
    values = np.array([[1e12, 1e12 + 8, 1e12 + 4], [50.0, 42.0, 46.0], [3e-12, 5e-12, 4e-12]])
    series = Series("it", values, ("high", "plain_upper", "tiny"))
    ahead = np.array([[1e12 + 2.123456], [47.1234567], [4.1234567e-12]])
    write_table(tmp_path / "it.csv", named_forecast(series.columns, ahead, values[:, :1] * 0), None, series)
    header, rows = rows_of(tmp_path / "it.csv")
    assert header[:5] == ["step", "high", "plain_upper", "tiny", "high_lower"]
    assert rows == [["4", *["1000000000002.12", "47.1234567", "4.1234567e-12"], *["1000000000002.12"] * 2,
                     *["47.1234567"] * 2, *["4.1234567e-12"] * 2]]  # fmt: skip


def test_a_picture_shows_names_as_they_are_and_intervals_of_a_single_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (drawn.append(figure), save(figure, path)))
    hours = np.datetime64("2024-01-01T00", "us") + np.arange(30) * np.timedelta64(1, "h")
    name = r"price ($/MWh) or $\frac{x"
    values = np.stack([np.arange(30.0), 1e12 + np.arange(30.0)])
    series = Series("it", values, (name, "a" * 200), hours, Frequency(3_600_000_000), utc=True)
    draw_forecast(tmp_path / "it.png", series, hours[-1:] + np.timedelta64(1, "h"), values[:, -1:] + 1,
                  np.full((2, 1), 5.0), 0.9)  # fmt: skip
    first, second = drawn[0].axes
    assert first.get_title(loc="left") == name
    assert not first._left_title.get_parse_math()  # type: ignore[attr-defined]
    assert second.get_title(loc="left") == "a" * 89 + "…"
    assert second.get_xlabel() == "UTC"
    heights = first.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (25.0, 35.0)
    ends = first.collections[0].get_paths()[0].vertices[:, 0]
    assert ends.max() - ends.min() == pytest.approx(1 / 24)  # an area, from the last value on


def test_another_file_under_the_same_name_is_refused(
    done: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = done
    data = Path(words[1])
    before = data.read_text()
    lines = before.splitlines()
    changed = {
        "training": before.replace(",4", ",5"),
        "validation": before.replace(lines[225], lines[225].rpartition(",")[0] + ",55.5"),
        "a row more": before + lines[-1].replace("T11", "T12") + "\n",
    }
    for text in changed.values():
        data.write_text(text)
        assert main(words) == 2
        assert "holds a model of other values than" in capsys.readouterr().err
    data.write_text(before)
    kept = done[0] / "samformer" / "files" / "series.json"
    text = kept.read_text()
    kept.write_text(text.replace('"sha256"', '"sha1"'))
    assert main(words) == 2
    assert "samformer was made by an earlier version of Trimtab: choose another folder" in capsys.readouterr().err
    kept.write_text(text)
    for more, message in (
        (["--epochs", "3"], "holds a model trained with another number of epochs, 2 there and 3 here"),
        (["--lookback", "24"], "holds a model trained with another look-back, 48 there and 24 here: choose another f"),
        (["--lr", "0.1"], "holds a model trained with another learning rate, 0.001 there and 0.1 here"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_a_run_that_stopped_early_is_trained_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["forecast", write_tides(tmp_path / "tides.csv"), "--horizon", "6", "--model", "dlinear", "--lr", "0.3"]
    words += ["--folder", str(tmp_path / "run"), *CPU]
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "dlinear" / "result.json").read_text())["status"] == "stopped early"
    assert "training DLinear" in capsys.readouterr().out
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "DLinear is trained already" in printed
    assert "training DLinear" not in printed


def test_another_model_forecasts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_tides(tmp_path / "tides.csv", dates=False)
    words = ["forecast", data, "--horizon", "6", "--lookback", "24", "--epochs", "1", *CPU]
    for kind, name, rest in (("dlinear", "DLinear", []), ("itransformer", "iTransformer", ["dlinear"])):
        folder = tmp_path / "runs" / f"forecast-tides-6-{kind}"
        assert main([*words, "--model", kind]) == 0
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted([kind, *rest])
        assert [row[0] for row in rows_of(folder / "scores.csv")[1]][-1] == name
        printed = capsys.readouterr().out
        assert "300 steps without dates, of 2 columns" in printed
        assert f"\n{name}" in printed
    assert main([*words, "--model", "dlinaer"]) == 2
    assert "dlinaer" in capsys.readouterr().err


def test_a_value_too_far_from_all_others_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(write_tides(tmp_path / "tides.csv"))
    lines = data.read_text().splitlines()
    lines[290] = lines[290].rpartition(",")[0] + ",1e20"
    data.write_text("\n".join(lines))
    assert main(["forecast", str(data), "--horizon", "6", "--folder", str(tmp_path / "run"), *CPU]) == 2
    assert "has a value of 1e+20 in column 'tide1'" in capsys.readouterr().err
    words = ["--missing", "previous", "--missing-value", "1e20", "--epochs", "1", "--folder", str(tmp_path / "run")]
    assert main(["forecast", str(data), "--horizon", "6", *words, *CPU]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "trimtab forecast needs --horizon; see trimtab forecast --help"),
        (["nowhere.csv", "--horizon", "6"], "there is no series 'nowhere.csv'. Expected ETTh1, "),
        (["{data}"], "trimtab forecast needs --horizon"),
        (["{data}", "--horizon", "0"], "--horizon must be at least 1, got 0"),
        (
            ["{data}", "--horizon", "31"],
            "the validation part of {data} has 30 of its 300 steps, fewer than the horizon, 31",
        ),
        (
            ["{data}", "--horizon", "30"],
            "--level: a level of 0.9 needs at least 9 windows of validation, and there are 1",
        ),
        (["{data}", "--horizon", "6", "--level", "9"], "--level: level must be above 0 and below 1"),
        (["{data}", "--horizon", "6", "--lookback", "300"], "210 training steps make 0 windows of look-back 300"),
        (["{data}", "--horizon", "6", "--columns", "tide0", "tide7"], "has no column 'tide7'. Did you mean tide"),
        (["{data}", "--horizon", "6", "--lr", "-1"], "lr must be a positive number"),
        (
            ["{data}", "--horizon", "6", "--split", "0.5", "0.5", "0.5"],
            "split must be whole numbers of steps, or shares",
        ),
        (["{bound}", "--horizon", "6"], "there is a column 'tide0_upper', which would be the bound of an interval"),
        (["{uneven}", "--horizon", "6"], "are not evenly apart: 149 of 299 steps are longer or shorter than 1:00:00"),
    ],
)
def test_what_cannot_be_forecast_is_told_before_anything_is_made(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_tides(tmp_path / "tides.csv")
    lines = Path(write_tides(tmp_path / "uneven.csv", 450)).read_text().splitlines()
    (tmp_path / "uneven.csv").write_text("\n".join([lines[0], *(line for n, line in enumerate(lines[1:]) if n % 3)]))
    (tmp_path / "bound.csv").write_text(Path(data).read_text().replace("tide1", "tide0_upper", 1))
    places = {"data": data, **{name: str(tmp_path / f"{name}.csv") for name in ("uneven", "bound")}}
    assert main(["forecast", *(word.format(**places) for word in words)]) == 2
    assert message.format(**places) in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bound.csv", "tides.csv", "uneven.csv"]


def test_a_look_back_is_chosen_by_what_there_is() -> None:
    assert lookback_for(8640, 96, 24) == 512  # as published
    assert lookback_for(2144, 96, 24) == 512
    assert lookback_for(2143, 96, 24) == 504  # a quarter, in whole days
    assert lookback_for(100, 12, 12) == 12
    assert lookback_for(100, 12, 52) == 22  # of which none fits
    assert lookback_for(100, 12, None) == 22
    assert lookback_for(10, 12, 12) == 1


@real
@pytest.mark.data
def test_a_benchmark_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["national-illness", "--horizon", "24", "--epochs", "1", "--folder", str(tmp_path / "run"), *CPU]
    assert main(["forecast", *words]) == 0
    assert "966 steps, 7 days apart, of 7 columns\nlook-back 156 (chosen)" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "run" / "forecast.csv")[1]) == 24
