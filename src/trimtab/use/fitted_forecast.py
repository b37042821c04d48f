"""A trained model that forecasts: from values to forecasts and intervals, all in the units of the columns."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trimtab.errors import DataError, RecipeError, RunFolderError
from trimtab.tasks.forecasting.conformal import conformal_margin
from trimtab.tasks.forecasting.forecasting_recipe import ForecastingRecipe
from trimtab.tasks.forecasting.parts import FILE, scaled, series_file
from trimtab.tasks.forecasting.series import Numbers, Series
from trimtab.tasks.forecasting.splits import Scaler, fit_scaler
from trimtab.tasks.forecasting.windows import windows
from trimtab.tasks.recipes import recipe_of
from trimtab.tasks.task import Examples
from trimtab.train.folder import FILES, RUN
from trimtab.train.trained import load_trained, open_trained

_WINDOWS = 1000  # of validation whose errors are kept,
_ERRORS = 2**24  # or fewer, so that they are at most so many numbers
_TOGETHER = 32  # windows


@dataclass(frozen=True, eq=False)
class FittedForecast:
    """A trained model with what belongs to it.

    Attributes:
        model: on the CPU, in eval mode; from windows (B, C, L) on its scale to (B, C, H).
        lookback: steps L.
        horizon: steps H.
        scaler: of the columns, by the training steps.
        errors: absolute errors on windows of the validation part, on the model's scale, (n, C, H), float32.
    """

    model: nn.Module
    lookback: int
    horizon: int
    scaler: Scaler
    errors: NDArray[np.float32]

    def forecast(self, series: Series) -> Numbers:
        """What comes after a series, of which the last L steps count: (C, H).

        Raises:
            DataError: there are fewer than L, or a value is too far from those of the training steps.
        """
        if series.num_steps < self.lookback:
            raise DataError(
                f"a forecast needs the last {self.lookback:,} steps, the look-back; there are {series.num_steps:,}"
            )
        seen = scaled(series, self.scaler, slice(-self.lookback, None))
        return self.scaler.unscale(self.of_windows(seen[None])[0].double().numpy())

    @torch.no_grad()
    def of_windows(self, x: Tensor) -> Tensor:
        """Forecasts of windows on the model's scale, (B, C, L) -> (B, C, H).

        A column that is constant over the training steps keeps its last value: there was nothing to learn of it.
        """
        constant = torch.from_numpy(self.scaler.constant)
        dtype = next((weight.dtype for weight in self.model.parameters()), x.dtype)  # as it was trained
        return torch.where(constant[:, None], x[..., -1:], self.model(x.to(dtype)).to(x.dtype))

    def margin(self, level: float) -> Numbers:
        """Half the width of the intervals around a forecast, (C, H); see `conformal_margin`.

        Raises:
            RecipeError: the level is out of range, or there were too few windows for it.
        """
        return conformal_margin(self.errors, level) * self.scaler.sd[:, None]

    def examples(self, series: Series, begin: int, end: int) -> Examples:
        """The windows of a series, on the model's scale, whose forecast lies from `begin` to before `end`."""
        values = scaled(series, self.scaler, slice(0, end))
        return windows(values, begin, end, self.lookback, self.horizon)


def fitted_forecast(folder: str | Path, series: Series, train: int, validation: int) -> FittedForecast:
    """What a run has trained, with its errors on the windows of the validation part: all, or 1,000 drawn from them.

    Args:
        folder: the run's.
        series: that it was trained on, without missing values.
        train: the step that ends its training part.
        validation: the step that ends its validation part.

    Raises:
        RunFolderError: the folder is no run of a forecasting recipe.
        CheckpointError: it has no whole checkpoint.
    """
    trained = open_trained(folder, ForecastingRecipe)
    recipe, channels = trained.recipe, series.num_columns
    model = load_trained(trained, lambda: recipe.make_model(channels))
    lookback, horizon = recipe.model.lookback, recipe.model.horizon
    nothing = np.empty((0, channels, horizon), np.float32)
    fitted = FittedForecast(model, lookback, horizon, fit_scaler(series.values[:, :train]), nothing)
    return replace(fitted, errors=_errors(fitted, fitted.examples(series, train, validation), recipe.seed))


def check_same_series(folder: Path, series: Series, train: int, validation: int) -> None:
    """Refuse to go on with a run whose columns, or values of training and validation, are not those of the series.

    Args:
        folder: the run's; it need not be there.
        series: without missing values.
        train: the step that ends its training part.
        validation: the step that ends its validation part.

    Raises:
        RunFolderError: the run has begun with other ones.
    """
    path = folder / FILES / FILE
    if not path.is_file():
        return
    there = path.read_text("utf-8")
    if '"sha256"' not in there:
        raise RunFolderError(f"{folder} was made by an earlier version of Trimtab: choose another folder (--folder)")
    if there != series_file(series, train, validation):
        raise RunFolderError(
            f"{folder} holds a model of other values than {series.name} has now: choose another folder (--folder), or "
            "remove this one to train anew"
        )


def check_same_training(folder: Path, recipe: ForecastingRecipe) -> None:
    """Refuse to go on with a run of other settings, and tell the first that differs by the name that people set.

    Args:
        folder: the run's; it need not be there.
        recipe: with which it would go on.

    Raises:
        RunFolderError: the run has begun with other ones.
    """
    try:
        there = recipe_of(json.loads((folder / RUN).read_bytes()))
    except (OSError, ValueError, TypeError, RecipeError):
        return  # nothing there, or what training will refuse
    if not isinstance(there, ForecastingRecipe):
        return
    epochs = there.steps // there.eval_every, recipe.steps // recipe.eval_every
    for name, then, now in (
        ("model", there.model.kind, recipe.model.kind),
        ("look-back", there.model.lookback, recipe.model.lookback),
        ("horizon", there.model.horizon, recipe.model.horizon),
        ("learning rate", there.lr, recipe.lr),
        ("seed", there.seed, recipe.seed),
        ("split", there.split, recipe.split),
        ("number of epochs", *epochs),
        ("batch size", there.batch_size, recipe.batch_size),
        ("stabilizer", there.stabilizer, recipe.stabilizer),
    ):
        if then != now:
            raise RunFolderError(
                f"{folder} holds a model trained with another {name}, {then} there and {now} here: choose another "
                "folder, or remove this one"
            )


def calibration_size(windows: int, channels: int, horizon: int) -> int:
    """How many of so many windows of validation calibrate the intervals."""
    return min(windows, _WINDOWS, max(1, _ERRORS // (channels * horizon)))


def named_forecast(columns: Sequence[str], forecast: Numbers, margin: Numbers | None) -> dict[str, Numbers]:
    """Forecasts by name, and with a margin then "NAME_lower" and "NAME_upper" of each.

    Args:
        columns: the names.
        forecast: (C, H).
        margin: (C, H).

    Raises:
        DataError: a column has the name of another's bound.
    """
    named = dict(zip(columns, forecast, strict=True))
    if margin is None:
        return named
    for column, middle, half in zip(columns, forecast, margin, strict=True):
        for name, bound in ((f"{column}_lower", middle - half), (f"{column}_upper", middle + half)):
            if name in named:
                raise DataError(f"there is a column {name!r}, which would be the bound of an interval: rename it")
            named[name] = bound
    return named


def _errors(fitted: FittedForecast, examples: Examples, seed: int) -> NDArray[np.float32]:
    generator = torch.Generator().manual_seed(seed)
    size = calibration_size(examples.size, len(fitted.scaler.sd), fitted.horizon)
    # drawn, not every so-manieth: that could be the same hour of every day
    chosen = torch.arange(size) if size == examples.size else torch.randperm(examples.size, generator=generator)[:size]
    found: list[NDArray[np.float32]] = []
    for indices in chosen.split(_TOGETHER):
        x, y = examples.batch(indices, generator)
        found.append((fitted.of_windows(x) - y).abs().float().numpy())
    return np.concatenate(found)
