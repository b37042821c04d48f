"""Prediction intervals from the errors on windows that training has not seen: split-conformal prediction.

Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005; Lei et al., "Distribution-Free Predictive
Inference for Regression", JASA 2018, arXiv 1604.04173, algorithm 2.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import RecipeError


def conformal_rank(size: int, level: float) -> int:
    """Which of so many errors, counted from the smallest, is the margin: k = ceil((size + 1) level).

    Args:
        size: errors that are known, n.
        level: the share of values that intervals shall hold, above 0 and below 1.

    Raises:
        RecipeError: the level is out of range, or k is more than n: no finite interval holds that much.
    """
    if not hasattr(level, "__float__") or not 0 < level < 1:
        raise RecipeError(f"level must be above 0 and below 1, as 0.9 is; got {level!r}")
    exact = Fraction(repr(float(level)))  # of what was written: 0.07 × 100 is 7, and 7.000000000000001 in floats
    rank = math.ceil((size + 1) * exact)
    if rank > size:
        least = math.ceil(exact / (1 - exact))
        raise RecipeError(
            f"a level of {level} needs at least {least:,} windows of validation, and there are {size:,}: take a lower "
            "level, or a longer validation part"
        )
    return rank


def conformal_margin(errors: NDArray[Any], level: float) -> NDArray[Any]:
    """Half the width of intervals around forecasts: of n absolute errors the k-th smallest, k = ceil((n + 1) level).

    That is their quantile at ceil((n + 1) level) / n. If the n errors and the one to come are exchangeable, the
    interval holds what comes with a probability of at least `level`, and of at most `level + 1 / (n + 1)` where no two
    errors are equal. Windows of one series overlap and follow each other, and are not exchangeable: then the level is
    reached about, and as long as the series stays as it was.

    Args:
        errors: absolute errors, (n, ...); every place after the first dimension, such as a column and a step of the
            horizon, has a margin of its own.
        level: the share of values that an interval shall hold, at each place by itself and not at all of them at once.

    Returns:
        (...), in the units of the errors.

    Raises:
        RecipeError: the level is out of range, or n too small for it.
    """
    place = conformal_rank(len(errors), level) - 1
    margin: NDArray[Any] = np.partition(errors, place, axis=0)[place]
    return margin
