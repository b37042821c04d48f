"""What is measured of the loss."""

import math
from collections.abc import Iterable
from statistics import median

# The median absolute deviation of a normal distribution times this is its standard deviation.
_NORMAL = 1.4826
_FEWEST = 5


def spike_score(recent_losses: Iterable[float], loss: float) -> float:
    """How far a loss lies above its recent past, in robust standard deviations.

    ``(loss - median) / (1.4826 · MAD)``, with the median and the median absolute deviation (MAD) of the recent losses:
    unlike mean and standard deviation they stay put when a spike is among them (Iglewicz and Hoaglin, How to Detect
    and Handle Outliers, 1993). Of a loss that falls steadily the next value lies below the median, so its score is
    negative.

    Args:
        recent_losses: the losses before this one, in any order; those that are not finite are left out.
        loss: the loss in question.

    Returns:
        The score; inf for a loss that is not finite, and for one above recent losses that are more than half alike;
        NaN when fewer than 5 finite recent losses are given, as they say nothing about spread.
    """
    recent = [value for value in recent_losses if math.isfinite(value)]
    if len(recent) < _FEWEST:
        return math.nan
    if not math.isfinite(loss):
        return math.inf
    middle = median(recent)
    spread = _NORMAL * median(abs(value - middle) for value in recent)
    above = loss - middle
    if spread == 0:
        return 0.0 if above == 0 else math.copysign(math.inf, above)
    return above / spread
