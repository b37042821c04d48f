"""`trimtab forecast`: from a file to its next steps, by a model that is trained on it."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console

from trimtab.errors import DataError, RecipeError, RunFolderError
from trimtab.models.forecasting import Kind
from trimtab.report.compare_words import count
from trimtab.tasks.forecasting.conformal import conformal_rank
from trimtab.tasks.forecasting.naive import last_season, last_value
from trimtab.tasks.forecasting.recipes import EPOCHS
from trimtab.tasks.forecasting.series import Missing, Series, complete
from trimtab.tasks.forecasting.sets import BENCHMARKS, find_series
from trimtab.tasks.forecasting.splits import SHARES, Split, ends_of
from trimtab.train.hardware import Hardware
from trimtab.train.progress import read_result
from trimtab.train.screen import console
from trimtab.train.train_command import stopped, train_on_screen
from trimtab.use.fitted_forecast import (
    FittedForecast,
    calibration_size,
    check_same_series,
    check_same_training,
    fitted_forecast,
    named_forecast,
)
from trimtab.use.forecast_files import draw_forecast, write_table
from trimtab.use.forecast_scores import Scores, by_column, overall, scores_of, write_scores
from trimtab.use.forecaster_settings import ForecasterSettings, usual
from trimtab.use.notices import told_once
from trimtab.use.steady_series import check_frequency, in_words
from trimtab.words import WordsError, parse_words

LOOKBACK = 512
"""The published one, which a file of enough rows has without --lookback."""

_NAMES: dict[Kind, str] = {
    "samformer": "SAMformer",
    "transformer": "Transformer",
    "itransformer": "iTransformer",
    "tsmixer": "TSMixer",
    "dlinear": "DLinear",
}
_FEW = 8  # columns that are told one by one


@dataclass(frozen=True)
class ForecastOptions:
    """Forecast the next steps of all columns of a CSV file, by SAMformer or another model trained on it.

    DATA is the file, a row for each step, or the name of a benchmark: ETTh1, weather, ... Its test part tells what the
    forecasts are worth, beside those that repeat the last value or season, and DLinear's. The folder has forecast.csv,
    forecast.png and scores.csv in the end. The same command again goes on where it was stopped.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """The file, or a benchmark's name."""

    horizon: int
    """How many steps to forecast."""

    model: Kind = "samformer"
    """Which forecasts; DLinear is trained beside it."""

    lookback: int | None = None
    """How many steps the model sees; None: 512, or a quarter of the training steps less the horizon if that is less, in
    whole seasons."""

    columns: tuple[str, ...] | None = None
    """Which columns to take; None: all that hold numbers."""

    split: Split | None = None
    """Shares of the steps, or steps, for training, choosing and the test; None: 0.7 0.1 0.2, of a benchmark the
    published ones."""

    missing: Missing = "refuse"
    """What becomes of missing values: an error, or the last value before."""

    missing_value: float | None = None
    """A number that stands for a missing value, as -9999 does."""

    level: float | None = 0.9
    """The share of values that intervals shall hold; None: no intervals."""

    epochs: int = EPOCHS
    """At most so many; training ends after 5 without a lower validation error."""

    lr: float = 1e-3
    """Peak learning rate."""

    seed: int = 0
    """Decides the weights at the start and the order of windows."""

    folder: Path | None = None
    """Where all goes, a new one or one to go on in; None: runs/forecast-NAME-HORIZON, and -MODEL unless that is
    SAMformer."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("horizon", "lookback", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WordsError(f"--{name} must be at least 1, got {value}")


@dataclass(frozen=True, eq=False)
class _Data:
    """A series without missing values, and the steps that end its parts."""

    series: Series
    train: int
    validation: int
    test: int


def forecast_command(words: Sequence[str]) -> int:
    """Run `trimtab forecast` with these words.

    Returns:
        The exit code: 0, or 130 if Ctrl-C stopped it.

    Raises:
        DataError: the file cannot be read, lacks values, has no clear frequency, or a part is too short.
        RecipeError: an option is out of range, or training diverged.
        RunFolderError: the folder holds something else.
        WordsError: an option is unknown or ill-typed.
    """
    options = parse_words(ForecastOptions, words, prog="trimtab forecast")
    data = _data(options)
    series = data.series
    season = None if series.frequency is None else series.frequency.season()
    lookback = options.lookback or lookback_for(data.train, options.horizon, season)
    _check_parts(options, data)
    kinds: tuple[Kind, ...] = (options.model,) if options.model == "dlinear" else (options.model, "dlinear")
    recipes = {
        kind: _settings(options, kind, lookback).recipe(options.data, data.train, options.split) for kind in kinds
    }
    name = Path(options.data).name.removesuffix(".gz").removesuffix(".csv")
    other = "" if options.model == ForecastOptions.model else f"-{options.model}"
    folder = options.folder or Path("runs") / f"forecast-{name}-{options.horizon}{other}"
    terminal = console()
    apart = " without dates" if series.frequency is None else f", {in_words(series.frequency)} apart"
    columns = count(series.num_columns, "column")
    _tell(terminal, f"{series.name}: {count(series.num_steps, 'step')}{apart}, of {columns}")
    _tell(terminal, f"look-back {lookback:,}{'' if options.lookback else ' (chosen)'}, horizon {options.horizon:,}")
    fitted: dict[Kind, FittedForecast] = {}
    with told_once(series.name, series.name):
        for kind, recipe in recipes.items():
            check_same_series(folder / kind, series, data.train, data.validation)
            recipe = replace(recipe, columns=options.columns, missing_value=options.missing_value)
            check_same_training(folder / kind, recipe)
            there = read_result(folder / kind)
            if there is not None and there.status != "diverged":  # it may have stopped early
                _tell(terminal, f"{_NAMES[kind]} is trained already, in {folder / kind}")
            elif not terminal.is_interactive:  # there, the folder is told all the time
                _tell(terminal, f"training {_NAMES[kind]}, in {folder / kind}")
            arm = {"arm": _NAMES[kind]}  # its name in reports
            result = train_on_screen(recipe, folder / kind, terminal, Hardware(options.accelerator), arm)
            if result.status == "interrupted":
                _tell(terminal, stopped(result, shlex.join(["trimtab", "forecast", *words])))
                return 130
            if result.status == "diverged":
                raise RecipeError(
                    f"{_NAMES[kind]} diverged at step {result.steps:,}: try a lower --lr than {recipe.lr:g}, in "
                    "another --folder"
                )
            fitted[kind] = fitted_forecast(folder / kind, series, data.train, data.validation)
    scores = _scores(fitted, data, season, options)
    _tell(terminal, _told(scores, fitted[options.model], data, season, options))
    _write(folder, fitted[options.model], data, scores, options.level)
    _tell(terminal, f"the next {count(options.horizon, 'step')}: {folder / 'forecast.csv'}, {folder / 'forecast.png'}")
    return 0


def lookback_for(train: int, horizon: int, season: int | None) -> int:
    """The look-back that a file has without --lookback.

    512 as published, or a quarter of the training steps less the horizon where that is less, so that there are three
    times as many windows as steps in one; in whole seasons, if one fits.

    Args:
        train: training steps.
        horizon: steps H to forecast.
        season: steps of a season; None if that is not known.
    """
    quarter = max(1, (train - horizon) // 4)
    if quarter >= LOOKBACK:
        return LOOKBACK
    return quarter - quarter % season if season and season <= quarter else quarter


def _data(options: ForecastOptions) -> _Data:
    series = find_series(options.data, options.columns)
    series = complete(series, options.missing, options.missing_value)
    if series.times is not None:
        check_frequency(series)
    split = options.split or (BENCHMARKS[options.data].split if options.data in BENCHMARKS else SHARES)
    return _Data(series, *ends_of(series.num_steps, split))


def _check_parts(options: ForecastOptions, data: _Data) -> None:
    parts = {"validation": data.validation - data.train, "test": data.test - data.validation}
    for part, steps in parts.items():
        if steps < options.horizon:
            raise DataError(
                f"the {part} part of {data.series.name} has {steps:,} of its {data.series.num_steps:,} steps, fewer "
                f"than the horizon, {options.horizon:,}: take a longer series, a smaller --horizon, or a larger part, "
                "as in --split 0.5 0.25 0.25"
            )
    if options.level is not None:
        nothing = np.zeros((data.series.num_columns, 0))
        named_forecast(data.series.columns, nothing, nothing)  # refuses a column that has the name of a bound
        windows = parts["validation"] - options.horizon + 1
        try:
            conformal_rank(calibration_size(windows, data.series.num_columns, options.horizon), options.level)
        except RecipeError as error:
            raise WordsError(f"--level: {error}; --level None has no intervals") from None


def _settings(options: ForecastOptions, kind: Kind, lookback: int) -> ForecasterSettings:
    model, stabilizer = usual(kind)
    return ForecasterSettings(
        model=replace(model, lookback=lookback, horizon=options.horizon),
        stabilizer=stabilizer,
        lr=options.lr,
        epochs=options.epochs,
        missing=options.missing,
        seed=options.seed,
        accelerator=options.accelerator,
    )


def _scores(
    fitted: dict[Kind, FittedForecast], data: _Data, season: int | None, options: ForecastOptions
) -> dict[str, Scores]:
    """What the test part tells of each way to forecast, the one that does so last."""
    model, level, horizon = fitted[options.model], options.level, options.horizon
    test = model.examples(data.series, data.validation, data.test)
    scores: dict[str, Scores] = {"last value": scores_of(lambda x: last_value(x, horizon), test)}
    if season is not None and season <= model.lookback:
        scores["last season"] = scores_of(lambda x: last_season(x, horizon, season), test)
    if options.model != "dlinear":
        scores["DLinear"] = scores_of(fitted["dlinear"].of_windows, test)
    margin = None if level is None else model.margin(level) / model.scaler.sd[:, None]
    scores[_NAMES[options.model]] = scores_of(model.of_windows, test, margin)
    return scores


def _told(
    scores: dict[str, Scores], model: FittedForecast, data: _Data, season: int | None, options: ForecastOptions
) -> str:
    lines = [f"on the {data.test - data.validation:,} test steps, of values scaled by the training steps:"]
    lines.append(overall(scores))
    if "last season" not in scores:
        why = "no season is known" if season is None else f"a season is {season:,} steps, more than the look-back"
        lines.append(f"(no last season: {why})")
    if data.series.num_columns <= _FEW:
        lines += ["", by_column(scores, data.series.columns, model.scaler), ""]
    best, name = min(scores, key=lambda name: scores[name].mse.mean()), _NAMES[options.model]
    if best != name:
        other = " (--model dlinear forecasts by it)" if best == "DLinear" else ""
        lines.append(f"the lowest MSE is not that of {name}, which forecasts, but {best}'s{other}")
    held = scores[name].held
    if held is not None:
        lines.append(f"its intervals of level {options.level:g} hold {held:.3f} of the test values")
    return "\n".join(lines)


def _write(folder: Path, model: FittedForecast, data: _Data, scores: dict[str, Scores], level: float | None) -> None:
    """Write forecast.csv, forecast.png and scores.csv, aside and then renamed."""
    series = data.series
    forecast = model.forecast(series)
    margin = None if level is None else model.margin(level)
    frequency = series.frequency
    times = None if series.times is None or frequency is None else frequency.after(series.times[-1], model.horizon)
    table, picture, worth = folder / "forecast.csv", folder / "forecast.png", folder / "scores.csv"
    try:
        columns = named_forecast(series.columns, forecast, margin)
        write_table(table.with_suffix(".csv.part"), columns, times, series)
        draw_forecast(picture.with_suffix(".part.png"), series, times, forecast, margin, level)
        write_scores(worth.with_suffix(".csv.part"), scores, series.columns, model.scaler)
        os.replace(worth.with_suffix(".csv.part"), worth)
        os.replace(table.with_suffix(".csv.part"), table)
        os.replace(picture.with_suffix(".part.png"), picture)
    except OSError as error:
        raise RunFolderError(f"cannot write to {folder}: {error.strerror or error}") from error


def _tell(terminal: Console, text: str) -> None:
    terminal.print(text, markup=False, highlight=False, soft_wrap=True)
