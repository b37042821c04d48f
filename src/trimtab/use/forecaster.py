"""`Forecaster`: frames in, frames out."""

import csv
import io
import operator
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from trimtab.errors import DataError, RecipeError, RunFolderError
from trimtab.models.forecasting import ForecastModelConfig, Kind
from trimtab.tasks.forecasting.recipes import EPOCHS
from trimtab.tasks.forecasting.series import Missing, Series
from trimtab.train.hardware import Hardware
from trimtab.train.loop import OnStep, train
from trimtab.use.fitted_forecast import FittedForecast, check_same_training, fitted_forecast, named_forecast
from trimtab.use.forecaster_file import FrameFacts, read_forecaster, write_forecaster
from trimtab.use.forecaster_settings import ForecasterSettings, usual
from trimtab.use.frames import frame_like, in_order, read_frame, series_of
from trimtab.use.notices import told_once
from trimtab.use.steady_series import check_frequency, check_goes_on, completed, joined, last

_SERIES, _RUN = "series.csv", "run"


class Forecaster:
    """Forecasts all columns of a frame at once, each from what all of them were.

        forecaster = Forecaster(lookback=168, horizon=24).fit(frame)
        forecaster.predict(frame, level=0.9)  # the next 24 steps, in the units of the columns, with intervals

    A frame is one of pandas or polars (or of another library that narwhals knows), a row for each step: numbers in its
    columns, and when they were taken in one column of dates or, in pandas, in a DatetimeIndex. Times must rise, and be
    evenly apart: so many microseconds, the same day of the month, its last day, or business days. Where up to a tenth
    of the steps are not (gaps, holidays), a warning tells how many, and they count like the others.

    Training is that of SAMformer (Ilbert, Odonnat et al., arXiv 2402.10198) by default: Adam with sharpness-aware
    minimisation, at most 100 epochs, and an end after 5 in which the error on the validation part did not fall, whose
    best weights are kept. The same part calibrates the intervals: docs/forecasting.md tells what that costs.

    Args:
        lookback: steps L that the model sees.
        horizon: steps H that it forecasts.
        model: "samformer", "transformer", "itransformer", "tsmixer" or "dlinear", with the sizes of the recipe of that
            name for ETTh1; or a config of your own, whose look-back, horizon and channels do not count.
        stabilizer: as recipes have it; None for "sam:rho=0.7" with SAMformer, and none with others.
        lr: peak learning rate.
        epochs: at most so many.
        batch_size: windows in a step; None for 32, or fewer of a short series, so that an epoch has 16 steps.
        missing: what becomes of missing values, NaN or null: an error ("refuse"), or the last value of the column
            before ("previous").
        seed: decides the weights at the start and the order of windows.
        accelerator: where to train; "auto" takes a GPU where there is one. Forecasts are made on the CPU.

    Raises:
        RecipeError: an argument is out of range.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        *,
        model: Kind | ForecastModelConfig = "samformer",
        stabilizer: str | None = None,
        lr: float = 1e-3,
        epochs: int = EPOCHS,
        batch_size: int | None = None,
        missing: Missing = "refuse",
        seed: int = 0,
        accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    ) -> None:
        config, spec = usual(model.kind if isinstance(model, ForecastModelConfig) else model)
        config = model if isinstance(model, ForecastModelConfig) else config
        self._settings = ForecasterSettings(
            model=replace(
                config, lookback=_whole("lookback", lookback), horizon=_whole("horizon", horizon), channels=None
            ),
            stabilizer=spec if stabilizer is None else stabilizer,
            lr=lr,
            epochs=epochs,
            batch_size=batch_size,
            missing=missing,
            seed=seed,
            accelerator=accelerator,
        )
        self._fitted: tuple[FrameFacts, FittedForecast] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the frame that was fitted, in order.

        Raises:
            RecipeError: nothing was fitted yet.
        """
        return self._known()[0].columns

    @property
    def metrics(self) -> dict[str, float]:
        """Mean squared and absolute error on the validation part, "mse" and "mae", of values scaled by training ones.

        Raises:
            RecipeError: nothing was fitted yet.
        """
        return dict(self._known()[0].metrics)

    def fit(
        self,
        frame: Any,
        valid: Any = 0.2,
        *,
        folder: str | Path | None = None,
        on_step: OnStep | None = None,
        exog: None = None,
    ) -> Self:
        """Train a model on a frame; an earlier one is forgotten.

        Args:
            frame: times and numbers.
            valid: what chooses the weights and calibrates the intervals: a share of the frame's steps, its last ones;
                or a frame that follows, with the same columns.
            folder: where the training is kept: the series as a CSV file, and its run folder, for `trimtab report`. The
                same call again goes on where it was stopped. None for a temporary one.
            on_step: called after every epoch with its `trimtab.train.Progress`.
            exog: exogenous columns cannot be used: anything but None is refused.

        Returns:
            Itself.

        Raises:
            DataError: a frame has no times, or they do not rise or are not evenly apart; a column holds no numbers;
                values are missing or infinite; `valid` has other columns, or does not follow; or a part is too short.
            RecipeError: `valid` is no share, training diverged, or a GPU is asked for where there is none.
            RunFolderError: `folder` holds the training of another forecaster, or something else.
            KeyboardInterrupt: Ctrl-C; with `folder`, the same call goes on.
        """
        _refuse_exogenous("exog", exog)
        series, local = series_of(read_frame(frame))
        series, begin = _with_validation(series, local, valid)
        series = completed(series, self._settings.missing)
        frequency = check_frequency(series)
        _check_validation(series, begin, self._settings.model.horizon)
        with _folder(folder) as place, torch.random.fork_rng(devices=[]):
            steps = (begin, series.num_steps - begin, 0)
            recipe = self._settings.recipe(str(place / _SERIES), begin, steps, watch=folder is not None)
            _write_series(place / _SERIES, series)
            check_same_training(place / _RUN, recipe)
            with told_once(recipe.data, series.name):
                result = train(recipe, place / _RUN, on_step, hardware=Hardware(self._settings.accelerator))
            if result.status == "interrupted":
                raise KeyboardInterrupt
            if result.status == "diverged":
                where = "" if folder is None else ", and another folder"
                raise RecipeError(
                    f"training diverged at step {result.steps:,}: take a lower lr than {recipe.lr:g}{where}"
                )
            fitted = fitted_forecast(place / _RUN, series, begin, series.num_steps)
        metrics = {name: result.metrics[name] for name in ("mse", "mae")}
        self._fitted = FrameFacts(series.columns, frequency, local, metrics), fitted
        return self

    def predict(self, frame: Any, level: float | None = None, *, future: None = None) -> Any:
        """Forecast what comes after the last row of a frame.

        Args:
            frame: times and numbers, of which the last L rows count; the columns of the fit, in any order.
            level: for intervals: the share of values that they shall hold, at each step by itself. They are
                split-conformal, forecast ± the ceil((n + 1) level)-th smallest of n absolute errors on the validation
                part, by column and step (Lei et al., arXiv 1604.04173); n is 1,000 at most. As windows of a series are
                not exchangeable, the level is reached about; see `trimtab.tasks.forecasting.conformal`.
            future: exogenous columns cannot be used: anything but None is refused.

        Returns:
            H rows of the library, and in the order, of `frame`: the times that follow, and a forecast for every
            column; with a level, then "NAME_lower" and "NAME_upper" of each.

        Raises:
            DataError: the frame is not like that of the fit: other columns, too few rows, times that are another
                distance apart; or values are missing.
            RecipeError: nothing was fitted yet; or the level is out of range, or too high for so few windows.
        """
        _refuse_exogenous("future", future)
        facts, fitted = self._known()
        margin = None if level is None else fitted.margin(level)
        found = read_frame(frame)
        series = in_order(series_of(found, local=facts.local)[0], facts.columns)
        if self._settings.missing == "previous":  # which may lie before what counts
            series = completed(series, "previous")
        assert series.times is not None  # those of the frame
        before = series.times
        series = completed(last(series, fitted.lookback), self._settings.missing)
        check_goes_on(series, facts.frequency, before)
        forecast = fitted.forecast(series)
        order = [facts.columns.index(column) for column in found.columns]
        made = named_forecast(found.columns, forecast[order], None if margin is None else margin[order])
        return frame_like(found, facts.frequency.after(before[-1], fitted.horizon), made, local=facts.local)

    def save(self, folder: str | Path) -> None:
        """Write what was fitted into a folder, two files; those of an earlier save are replaced.

        Raises:
            RecipeError: nothing was fitted yet.
            RunFolderError: the folder cannot be written.
        """
        write_forecaster(folder, self._settings, *self._known())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` has written; it forecasts what the saved one did, to the bit.

        Raises:
            CheckpointError: there is none in the folder, or it is damaged.
        """
        settings, facts, fitted = read_forecaster(folder)
        made = cls.__new__(cls)
        made._settings, made._fitted = settings, (facts, fitted)
        return made

    def _known(self) -> tuple[FrameFacts, FittedForecast]:
        if self._fitted is None:
            raise RecipeError("this Forecaster has nothing fitted yet: call fit(frame), or Forecaster.load(folder)")
        return self._fitted


def _whole(name: str, value: object) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]  # which is what it finds out; numpy's are fine
    except TypeError:
        pass
    raise RecipeError(f"{name} must be a whole number; got {value!r}")


def _refuse_exogenous(name: str, value: object) -> None:
    if value is not None:
        raise DataError(
            f"{name} cannot be used: no model here takes exogenous columns. A column whose past is known can be one of "
            "the frame, and is forecast like the others"
        )


def _with_validation(series: Series, local: bool, valid: Any) -> tuple[Series, int]:
    """The series with its validation part, and the step that this begins at."""
    if isinstance(valid, Real):
        share = float(valid)
        if not 0 < share < 1:
            raise RecipeError(f"valid must be a share between 0 and 1, or a frame that follows; got {valid}")
        return series, series.num_steps - round(series.num_steps * share)
    more = series_of(read_frame(valid, "the validation frame"), local=local)[0]
    return joined(series, in_order(more, series.columns)), series.num_steps


def _check_validation(series: Series, begin: int, horizon: int) -> None:
    steps = series.num_steps - begin
    if steps < horizon:
        raise DataError(
            f"the validation part has {steps:,} steps, fewer than the horizon, {horizon:,}: give a larger `valid`, a "
            "longer series, or a smaller horizon"
        )


@contextmanager
def _folder(folder: str | Path | None) -> Iterator[Path]:
    if folder is not None:
        yield Path(folder).expanduser()  # as the series' path will be
        return
    with tempfile.TemporaryDirectory(prefix="trimtab-forecaster-") as temporary:
        yield Path(temporary)


def _write_series(path: Path, series: Series) -> None:
    """Write a series as a CSV file that is read as the very same numbers; one that is there must have them already."""
    assert series.times is not None  # those of the frame
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    writer.writerow(["date", *series.columns])
    dates = np.datetime_as_string(series.times, "us")
    writer.writerows([date, *row] for date, row in zip(dates, series.values.T.tolist(), strict=True))
    content = text.getvalue().encode()
    try:
        if path.exists():
            if path.read_bytes() != content:
                raise RunFolderError(f"{path} holds another series: choose another folder")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
