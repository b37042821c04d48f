"""What is measured of one arm over learning rates and seeds: pure functions over arrays (..., S, L).

S seeds, L learning rates, ascending; leading dimensions are resamples of the seeds. docs/compare.md has the formulas.
"""

import numpy as np

from trimtab.report.runlog import Floats

TOLERANCE = 0.1
"""Of the way from the loss at init to the best loss: how much of it a learning rate may miss and still count."""


def lr_sensitivity(loss: Floats) -> Floats:
    """How much is lost by a learning rate that is not the best (Wortsman et al., arXiv 2309.14322).

    For each seed, the mean over the learning rates of the loss over that at the seed's own best one; then the mean over
    the seeds.

    Args:
        loss: min(final loss, loss at init), (..., S, L).

    Returns:
        (...), at least 0; 0 means that any learning rate of the grid does.
    """
    return (loss - loss.min(axis=-1, keepdims=True)).mean(axis=(-2, -1))


def lr_sensitivity_to(loss: Floats, best: Floats) -> Floats:
    """The same against one loss for all arms, the best that any of them reached: sensitivity and quality in one.

    Args:
        loss: min(final loss, loss at init), (..., S, L).
        best: the best loss of all arms, (...).

    Returns:
        (...).
    """
    return loss.mean(axis=(-2, -1)) - best


def at_best_lr(values: Floats, by: Floats) -> Floats:
    """The mean over the seeds at the best learning rate.

    Args:
        values: (..., S, L).
        by: lower is better, (..., S, L): the best learning rate is the one with the lowest median over the seeds.

    Returns:
        (...).
    """
    place = np.median(by, axis=-2).argmin(axis=-1)  # (...)
    return np.take_along_axis(values.mean(axis=-2), place[..., None], axis=-1)[..., 0]


def lr_range(loss: Floats, initial: Floats, lrs: Floats, tolerance: float = TOLERANCE) -> Floats:
    """How wide the learning rates are that do nearly as well as the best.

    Counted are the neighbours of the best learning rate whose median loss over the seeds is at most
    `best + tolerance * (loss at init - best)`, without a gap.

    Args:
        loss: min(final loss, loss at init), (..., S, L).
        initial: the loss at init, (..., S, L).
        lrs: (L,), ascending.
        tolerance: see there.

    Returns:
        (...), in decades from the lowest to the highest of them: 1 is a factor of 10. 0 when only the best does.
    """
    middle = np.median(loss, axis=-2)  # (..., L)
    best, start = middle.min(axis=-1), np.median(initial, axis=(-2, -1))  # (...)
    near = middle <= (best + tolerance * (start - best))[..., None]
    near &= (best < start)[..., None]  # no learning rate that learns: no range
    places = np.arange(len(lrs))
    place = middle.argmin(axis=-1)[..., None]  # (..., 1)
    below = np.where(~near & (places <= place), places, -1).max(axis=-1) + 1
    above = np.where(~near & (places >= place), places, len(lrs)).min(axis=-1) - 1
    logs = np.log10(lrs)
    return np.where(above >= below, logs[np.clip(above, 0, None)] - logs[np.clip(below, None, len(lrs) - 1)], 0.0)


def share_failed(failed: Floats) -> Floats:
    """The share of runs that diverged, raised, or ended no better than they began: (..., S, L) to (...)."""
    return failed.mean(axis=(-2, -1))


def lowest(values: Floats) -> Floats:
    """The lowest over the learning rates, median over the seeds: (..., S, L) to (...). NaN where none is known."""
    return np.median(np.fmin.reduce(values, axis=-1), axis=-1)


def highest(values: Floats) -> Floats:
    """The highest over the learning rates, median over the seeds: (..., S, L) to (...). NaN where none is known."""
    return np.median(np.fmax.reduce(values, axis=-1), axis=-1)


def mean(values: Floats) -> Floats:
    """The mean over seeds and learning rates: (..., S, L) to (...)."""
    return values.mean(axis=(-2, -1))


def middle(values: Floats) -> Floats:
    """The median over all runs: (..., S, L) to (...). NaN where one is not known."""
    return np.median(values, axis=(-2, -1))
