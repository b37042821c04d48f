"""A curve in one line of text."""

import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-~=+*#"

_LOGARITHMIC = 30.0  # from this ratio of the largest to the smallest value on, a linear scale hides the small ones


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Draw a curve: each character is the mean of its share of the values, "!" where one of them is not finite.

    The scale runs from the smallest to the largest mean, logarithmic when all are positive and the largest is more
    than 30 times the smallest.

    Args:
        values: the curve, oldest first.
        width: at most so many characters.
        bars: characters from lowest to highest.
    """
    width = min(width, len(values))
    parts = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]  # not finite as soon as one of them is not
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    logarithmic = low > 0 and high > _LOGARITHMIC * low
    if logarithmic:
        low, high = math.log(low), math.log(high)
    half = high / 2 - low / 2  # of the span, which itself may overflow

    def character(mean: float) -> str:
        if not math.isfinite(mean):
            return "!"
        height = math.log(mean) if logarithmic else mean
        return bars[round((height / 2 - low / 2) / half * (len(bars) - 1))] if half > 0 else bars[0]

    return "".join(map(character, means))
