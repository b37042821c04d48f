"""Fewer points of a curve, without losing a spike."""

import numpy as np

from trimtab.report.runlog import Floats


def decimate(steps: Floats, values: Floats, points: int = 200) -> tuple[Floats, Floats]:
    """Keep at most `points` + 2 points of a curve: of each stretch the lowest and the highest, and both ends.

    Args:
        steps: (N,), ascending.
        values: (N,); what is not finite is left out.
        points: how many are kept, beside both ends; an even number.

    Returns:
        Steps and values of the points that are kept, (M,) each, in their order.
    """
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if len(values) <= points + 2:
        return steps, values
    if values.min() == values.max():  # a constant learning rate
        return steps[[0, -1]], values[[0, -1]]
    width = -(-len(values) // (points // 2))  # of a stretch
    padded = np.full(-(-len(values) // width) * width, values[-1])
    padded[: len(values)] = values
    rows = padded.reshape(-1, width)
    starts = np.arange(len(rows)) * width
    chosen = np.concatenate([starts + rows.argmin(axis=1), starts + rows.argmax(axis=1), [0, len(values) - 1]])
    kept = np.unique(np.minimum(chosen, len(values) - 1))
    return steps[kept], values[kept]
