"""Which steps of a series are for training, for choosing and for the test; and the scale of its columns."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import DataError, RecipeError
from trimtab.tasks.forecasting.series import Numbers

Split = tuple[int, int, int] | tuple[float, float, float]
"""Of training, validation and test: steps from the first on, or shares of all steps."""

SHARES: Split = (0.7, 0.1, 0.2)
"""The published one of all benchmarks but ETT."""

_ROUNDING = 4 * float(np.finfo(np.float64).eps)  # of values, relative to the largest


def check_split(split: Split) -> None:
    """Refuse what is no split.

    Raises:
        RecipeError: a part is negative, there is none for training or validation, or shares do not add up to 1.
    """
    if not all(part >= 0 for part in split) or not (split[0] > 0 and split[1] > 0):
        raise RecipeError(
            f"split must have a part for training, one for validation, and none or one for the test; got {split}"
        )
    if not _are_steps(split) and not math.isclose(sum(split), 1, abs_tol=1e-6):
        raise RecipeError(f"split must be whole numbers of steps, or shares that add up to 1; got {split}")


def ends_of(num_steps: int, split: Split) -> tuple[int, int, int]:
    """The step before which each part ends; each begins where the one before ends.

    Shares of training and test are rounded down, as in the published protocol; validation has the rest.

    Raises:
        DataError: the series is shorter than the split.
        RecipeError: it is no split.
    """
    check_split(split)
    if _are_steps(split):
        first, second, third = (int(part) for part in np.cumsum(split))
        if third > num_steps:
            raise DataError(f"the split {split} needs {third:,} steps, and the series has {num_steps:,}: take shares")
        return first, second, third
    train, test = int(num_steps * split[0]), int(num_steps * split[2])
    return train, num_steps - test, num_steps


def _are_steps(split: Split) -> bool:
    return all(isinstance(part, int) for part in split)


@dataclass(frozen=True)
class Scaler:
    """What makes the values of each column comparable: minus its mean, over its standard deviation.

    Attributes:
        mean: (C,).
        sd: (C,), 1 for a column that is constant.
        constant: whether a column is, but for rounding, (C,).
    """

    mean: Numbers
    sd: Numbers
    constant: NDArray[np.bool_]

    def scale(self, values: Numbers) -> Numbers:
        """Values (..., C, T) on the scale of the model."""
        return (values - self.mean[:, None]) / self.sd[:, None]

    def unscale(self, values: Numbers) -> Numbers:
        """The same back, in their own units."""
        return values * self.sd[:, None] + self.mean[:, None]


def fit_scaler(values: Numbers) -> Scaler:
    """The scale of columns, (C, T), by all their values: of the training part only."""
    sd = values.std(axis=1)
    # of a constant one the mean is rounded, and its deviation not quite zero; .1 + .2 is not .3 either
    rounding = _ROUNDING * np.abs(values).max(axis=1)
    constant = (values == values[:, :1]).all(axis=1) | (sd <= rounding)
    return Scaler(np.where(constant, values[:, 0], values.mean(axis=1)), np.where(constant, 1.0, sd), constant)
