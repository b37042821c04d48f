"""Spearman's rank correlation, also with a third quantity held fixed, and its interval over runs."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from trimtab.report.differences import interval
from trimtab.report.runlog import Floats

DRAWS = 1000


def rank_correlation(x: Floats, y: Floats, groups: Floats | None = None) -> Floats:
    """Spearman's rho over the last dimension, (..., runs) to (...); NaN where one of the two has a single value.

    With groups, (..., runs), it is the partial one, given the group: ranks are over all runs, and the mean rank of its
    group is taken from each. Runs that are alike in nothing but their group then have none.
    """
    x_ranks, y_ranks = (_centred(rankdata(values, axis=-1), groups) for values in (x, y))
    size = np.sqrt((x_ranks**2).sum(-1) * (y_ranks**2).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size > 1e-9, (x_ranks * y_ranks).sum(-1) / size, np.nan)


def _centred(ranks: Floats, groups: Floats | None) -> Floats:
    if groups is None:
        return ranks - ranks.mean(-1, keepdims=True)
    members = (groups[..., None] == np.unique(groups)).astype(float)  # (..., runs, groups)
    means = (ranks[..., None] * members).sum(-2) / np.maximum(members.sum(-2), 1)  # (..., groups)
    return ranks - (members * means[..., None, :]).sum(-1)


def with_interval(statistic: Callable[[NDArray[np.int64]], Floats], runs: int) -> list[float]:
    """A statistic of the runs with the given indices, and its 95 % bootstrap interval: whole runs are drawn anew.

    Draws that have no such number (all of one learning rate, say) are left out; without any, the ends are NaN.

    Args:
        statistic: from indices (..., runs) to (...).
        runs: how many there are.
    """
    drawn = statistic(np.random.default_rng(0).integers(runs, size=(DRAWS, runs)))
    known = drawn[np.isfinite(drawn)]
    low, high = interval(known, runs) if len(known) else (float("nan"), float("nan"))
    return [float(statistic(np.arange(runs))), low, high]


def within(curves: Sequence[tuple[Floats, Floats]]) -> list[float]:
    """The rank correlation over the time of one run, the median of the runs, and its interval."""
    each = np.array([rank_correlation(x, y) for x, y in curves if len(x) > 2])
    each = each[np.isfinite(each)]
    return with_interval(lambda runs: np.median(each[runs], axis=-1), len(each)) if len(each) else [float("nan")] * 3
