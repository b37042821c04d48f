"""`ForecastingRecipe`: a model that forecasts all columns of a series at once, as a typed, frozen config."""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.models.forecasting import ForecastModelConfig, make_forecast_model
from trimtab.tasks.forecasting.naive import errors
from trimtab.tasks.forecasting.parts import Parts, parts_of
from trimtab.tasks.forecasting.series import Missing, Series, complete, missing_of, told
from trimtab.tasks.forecasting.sets import BENCHMARKS, find_series
from trimtab.tasks.forecasting.splits import SHARES, Split, check_split
from trimtab.tasks.forecasting.toy import is_toy, toy_parts
from trimtab.tasks.notices import warn
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Task

Windows = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ForecastingRecipe(Recipe):
    """A model that forecasts the next steps of all columns, by the mean squared error.

    Metrics, of all windows of the validation steps while training and of the test steps at the end: "mse", which
    decides, and "mae", both over columns and steps on values scaled by the training steps, as published work has them.
    "eval_loss" is the first again.

    Attributes:
        data: name of a benchmark or path of a CSV file, see `trimtab.tasks.forecasting.sets.find_series`; or "toy".
        model: the model; it has as many channels as the series has columns.
        split: steps for training, validation and test from the first step on, or shares of all of them; None for the
            published ones of a benchmark, and 0.7, 0.1 and 0.2 of a file.
        columns: which to take, in this order; None for all that hold numbers.
        missing: what becomes of missing values: an error ("refuse"), or the last value before ("previous").
        missing_value: a number that stands for a missing value, as -9999 does in the weather, where published work
            takes it for a value like others; None for none.

    Raises:
        RecipeError: a field is out of range, or has the wrong type.
    """

    data: str
    model: ForecastModelConfig
    split: Split | None = None
    columns: tuple[str, ...] | None = None
    missing: Missing = "refuse"
    missing_value: float | None = None
    eval_micro_batches: int = 1  # shallow models: without gradients they need as much memory

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size // self.accumulate < self.model.least_batch:
            raise RecipeError(
                f"{self.model.kind} with window_norm batch normalises over the windows of a batch: expected at least "
                f"{self.model.least_batch} in each of {self.accumulate} micro-batches, got batch_size {self.batch_size}"
            )
        if self.split is not None:
            check_split(self.split)
        if self.columns is not None and not self.columns:
            raise RecipeError("columns must name at least one, or be None for all")
        if is_toy(self.data) and (self.split, self.columns, self.missing_value) != (None, None, None):
            raise RecipeError("the toy problem is no series: it takes no split, columns or missing_value")

    def series(self) -> Series:
        """Load the series, with its missing values.

        Raises:
            DataError: it cannot be loaded.
        """
        return find_series(self.data, self.columns)

    def parts(self) -> Parts:
        """Load the data in parts.

        Raises:
            DataError: they cannot be loaded, values are missing, or a part is too short.
        """
        if is_toy(self.data):
            return toy_parts(self.data, self.model.lookback, self.model.horizon)
        series = self.series()
        split = self.split or (BENCHMARKS[self.data].split if self.data in BENCHMARKS else SHARES)
        counts = missing_of(series, self.missing_value)
        parts = parts_of(
            complete(series, self.missing, self.missing_value), self.model.lookback, self.model.horizon, split
        )
        if counts:
            warn(f"{series.name}: missing values, which take the last value before: {told(counts)}")
        return replace(parts, facts={**parts.facts, "missing": counts})

    def make_model(self, channels: int) -> nn.Module:
        """Draw the model for so many channels.

        Raises:
            RecipeError: it is for another number.
        """
        if self.model.channels not in (None, channels):
            raise RecipeError(
                f"the model has {self.model.channels} channels, and {self.data} {channels} columns: leave out "
                "--model.channels, or choose as many --columns"
            )
        return make_forecast_model(replace(self.model, channels=channels))

    def task(self) -> Task:
        """Load the data and draw the model.

        Raises:
            DataError: the data cannot be loaded, values are missing, or a part is too short.
            RecipeError: the model is for another number of channels.
        """
        parts = self.parts()
        return Task(
            model=self.make_model(parts.channels),
            train=parts.train,
            loss=loss,
            evaluation=parts.validation,
            test=parts.test,
            score=score,
            summarize=summarize,
            metric="mse",
            facts=parts.facts,
            files=parts.files,
        )


def loss(model: nn.Module, batch: Windows) -> Tensor:
    """Mean squared error over windows, columns and steps, (): batch of (B, C, L) and (B, C, H)."""
    x, y = batch
    return F.mse_loss(model(x), y)


def score(model: nn.Module, batch: Windows) -> dict[str, Tensor]:
    """Of each window its mean squared and absolute error, (B,)."""
    return errors(model, *batch)


def summarize(means: dict[str, float], size: int) -> dict[str, float]:
    """The metrics, from the means over all windows."""
    return {"eval_loss": means["mse"], **means}
