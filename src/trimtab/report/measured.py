"""Every measure of a comparison: by arm, with its interval, and which differences the seeds can carry."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trimtab.report import measures
from trimtab.report.comparison import Comparison, Grid
from trimtab.report.differences import Difference, differences, interval, resamples, winner
from trimtab.report.runlog import Floats


@dataclass(frozen=True)
class Measure:
    """What a number means.

    Attributes:
        name: its column in a CSV.
        title: its column on the page.
        meaning: in one sentence.
        better: whether a lower or a higher one is better; None for what is no contest.
        form: how it is printed.
    """

    name: str
    title: str
    meaning: str
    better: Literal["lower", "higher"] | None = None
    form: str = ".3f"


@dataclass(frozen=True)
class Measured:
    """A measure of every arm.

    Attributes:
        measure: which.
        values: by arm; NaN where it is not known.
        intervals: 95 % over resampled seeds, by arm; NaN with one seed.
        differences: every pair of arms; empty for what is no contest.
        winner: the best arm, if the seeds tell it from every other.
        behind: the arms that the seeds tell to be worse than the best.
    """

    measure: Measure
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    differences: tuple[Difference, ...] = ()
    winner: str | None = None
    behind: frozenset[str] = frozenset()


LR_SENSITIVITY = Measure(
    "lr_sensitivity",
    "LR sensitivity",
    "mean over the learning rates of min(final loss, loss at init) minus the same at the arm's own best learning rate, "
    "mean over the seeds",
    "lower",
)
LR_SENSITIVITY_TO_BEST = Measure(
    "lr_sensitivity_to_best",
    "LR sensitivity, against the best of all",
    "mean over the learning rates and seeds of min(final loss, loss at init) minus the best loss of all arms",
    "lower",
)
BEST_LOSS = Measure(
    "best_loss", "best loss", "mean over the seeds of the final loss at the arm's best learning rate", "lower", ".4g"
)
BEST_METRIC = Measure(
    "best_metric", "best metric", "mean over the seeds of the final metric at the arm's best learning rate for it"
)
LR_RANGE = Measure(
    "lr_range_decades",
    "LR range, decades",
    "decades of learning rates, around the best one without a gap, whose median loss is within the tolerance",
    "higher",
    ".2f",
)
SHARE_FAILED = Measure(
    "share_failed",
    "share failed",
    "share of runs that diverged, raised an error, or ended with a loss no lower than at init",
    "lower",
    ".2f",
)
ENTROPY_MIN = Measure(
    "entropy_min",
    "lowest entropy",
    "lowest attention entropy of any head at any logged step and learning rate, 0 to 1; median over the seeds",
)
MAX_LOGIT = Measure(
    "max_logit",
    "largest logit",
    "largest attention logit of any head at any logged step and learning rate; median over the seeds",
    form=",.4g",
)
SPIKES = Measure("spikes", "spikes a run", "how often the logged loss jumped up, mean over the runs", form=".2f")
STEP_RATIO = Measure("step_time_ratio", "step time", "median time of a step over that of the first arm", form=".2f")
MEMORY_RATIO = Measure("memory_ratio", "memory", "median peak memory over that of the first arm", form=".2f")
_OVER_LRS = (LR_SENSITIVITY, LR_SENSITIVITY_TO_BEST, LR_RANGE)  # of one learning rate they say nothing


def measure_all(comparison: Comparison, tolerance: float = measures.TOLERANCE) -> list[Measured]:
    """Measure every arm, in the order of the page's columns; empty when nothing can be measured.

    Args:
        comparison: the runs.
        tolerance: see `measures.lr_range`.
    """
    grids, num_seeds = comparison.grids, len(comparison.seeds)
    if not grids:
        return []
    lrs = np.array(comparison.lrs)
    sign = -1.0 if comparison.higher_is_better else 1.0
    whole = np.arange(num_seeds)[None]  # the seeds as they are, as one more resample
    drawn = np.concatenate([whole, resamples(num_seeds)])  # (1 + count, S)

    def loss(grid: Grid, seeds: NDArray[np.int64]) -> Floats:
        return measures.at_best_lr(grid.loss[seeds], grid.loss[seeds])

    def metric(grid: Grid, seeds: NDArray[np.int64]) -> Floats:
        return measures.at_best_lr(grid.metric[seeds], sign * grid.metric[seeds])

    def sensitivity(grid: Grid, seeds: NDArray[np.int64]) -> Floats:
        value = measures.lr_sensitivity(grid.loss[seeds])
        return np.full_like(value, math.nan) if grid.failed.all() else value  # 0 would win, and says nothing

    best_of_all = np.min([loss(grid, drawn) for grid in grids.values()], axis=0)
    first = next(iter(grids.values()))
    base_time, base_memory = (measures.middle(of[drawn]) for of in (first.step_seconds, first.peak_memory))

    def lr_range(grid: Grid, seeds: NDArray[np.int64]) -> Floats:
        return measures.lr_range(grid.loss[seeds], grid.initial_loss[seeds], lrs, tolerance)

    functions: dict[Measure, tuple[Callable[[Grid, NDArray[np.int64]], Floats], float]] = {
        BEST_LOSS: (loss, 0.0),
        LR_SENSITIVITY: (sensitivity, 0.0),
        LR_SENSITIVITY_TO_BEST: (
            lambda grid, seeds: measures.lr_sensitivity_to(grid.loss[seeds], best_of_all),
            0.0,
        ),
        LR_RANGE: (lr_range, float(np.log10(lrs[-1] / lrs[0]) / max(1, len(lrs) - 1))),
        SHARE_FAILED: (
            lambda grid, seeds: measures.share_failed(grid.failed[seeds]),
            1 / (len(lrs) * math.sqrt(num_seeds)),  # of a mean over the seeds
        ),
        ENTROPY_MIN: (lambda grid, seeds: measures.lowest(grid.entropy_min[seeds]), 0.0),
        MAX_LOGIT: (lambda grid, seeds: measures.highest(grid.max_logit[seeds]), 0.0),
        SPIKES: (lambda grid, seeds: measures.mean(grid.spikes[seeds]), 0.0),
        STEP_RATIO: (lambda grid, seeds: measures.middle(grid.step_seconds[seeds]) / base_time, 0.0),
        MEMORY_RATIO: (lambda grid, seeds: measures.middle(grid.peak_memory[seeds]) / base_memory, 0.0),
    }
    if comparison.metric:
        named = Measure(
            BEST_METRIC.name,
            f"best {comparison.metric}",
            BEST_METRIC.meaning,
            "higher" if comparison.higher_is_better else "lower",
        )
        step = _resolution([grid.metric for grid in grids.values()]) / math.sqrt(num_seeds)  # of a mean over the seeds
        functions = {BEST_LOSS: functions[BEST_LOSS], named: (metric, step), **functions}
    if len(lrs) == 1:
        functions = {of: function for of, function in functions.items() if of not in _OVER_LRS}
    return [
        _measured(measure, {arm: of(grid, drawn) for arm, grid in grids.items()}, num_seeds, step)
        for measure, (of, step) in functions.items()
    ]


def best_lr(comparison: Comparison, arm: str, measure: Measure) -> float | None:
    """The learning rate at which an arm is best, by the median over the seeds of the loss or the metric.

    None for a measure that has none, and for an arm all of whose runs failed.
    """
    grid = comparison.grids[arm]
    if measure.name not in (BEST_LOSS.name, BEST_METRIC.name) or grid.failed.all():
        return None
    values = grid.loss
    if measure.name == BEST_METRIC.name:
        values = -grid.metric if comparison.higher_is_better else grid.metric
    return comparison.lrs[int(np.median(values, axis=0).argmin())]


def _resolution(values: Sequence[Floats]) -> float:
    """The least by which two values differ: one example, of an accuracy; next to nothing, of what is continuous."""
    gaps = np.diff(np.unique(np.round(np.concatenate([each.ravel() for each in values]), 9)))
    return float(np.nanmin(gaps, initial=math.inf)) if np.isfinite(gaps).any() else 0.0


def _measured(measure: Measure, drawn: Mapping[str, Floats], num_seeds: int, step: float) -> Measured:
    """Split the first resample, which is the seeds as they are, from the others, and compare the arms."""
    values = {arm: float(each[0]) for arm, each in drawn.items()}
    draws = {arm: each[1:] for arm, each in drawn.items()}
    intervals = {arm: interval(each, num_seeds) for arm, each in draws.items()}
    known = {arm: value for arm, value in values.items() if math.isfinite(value)}
    if measure.better is None or len(known) < 2:
        return Measured(measure, values, intervals)
    found = differences(values, draws, num_seeds, step)
    higher = measure.better == "higher"
    best = (max if higher else min)(known, key=lambda arm: known[arm])
    behind = {
        each.first if each.second == best else each.second
        for each in found
        if each.told and best in (each.first, each.second)
    }
    return Measured(measure, values, intervals, tuple(found), winner(values, found, higher), frozenset(behind))
