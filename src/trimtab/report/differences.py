"""Which differences the seeds can carry: one resampling of the seeds for all arms, intervals, and Holm's correction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from trimtab.report.runlog import Floats

RESAMPLES = 4000
LEVEL = 0.05
"""A difference counts as told when it would come up by chance, among all pairs of arms, in fewer than 5 % of cases."""
MIN_SEEDS = 3
"""With fewer seeds than this nothing is told."""

_DUST = 1e-9  # of the largest value: what rounding may leave of a difference that is none


@dataclass(frozen=True)
class Difference:
    """One measure, one pair of arms.

    Attributes:
        first: an arm.
        second: another.
        value: the measure of `first` minus that of `second`.
        low: lower end of its 95 % interval; NaN with one seed.
        high: upper end.
        p: of the paired test, corrected for the number of pairs (Holm); NaN with fewer than `MIN_SEEDS` seeds.
        told: whether the seeds can tell the two apart.
    """

    first: str
    second: str
    value: float
    low: float
    high: float
    p: float
    told: bool


def resamples(num_seeds: int, count: int = RESAMPLES) -> NDArray[np.int64]:
    """Draws of the seeds with replacement, (count, num_seeds), always the same ones.

    Arms that share seeds are resampled together, with all learning rates of a seed: what a seed does to all of them
    (its weights at the start, its order of the data) then cancels out of their differences.
    """
    return np.random.default_rng(0).integers(num_seeds, size=(count, num_seeds))


def interval(draws: Floats, num_seeds: int) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values, (count,); NaN with one seed, or where a draw is NaN."""
    if num_seeds < 2 or not np.isfinite(draws).all():
        return math.nan, math.nan
    low, high = np.quantile(draws, (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)


def differences(
    values: dict[str, float], draws: dict[str, Floats], num_seeds: int, step: float = 0.0
) -> list[Difference]:
    """Compare every pair of arms on one measure.

    The statistic is the difference over its standard error, that of the resampled differences; it is held against
    Student's t with one degree of freedom less than there are seeds. For a mean over the seeds this is the paired t
    test.

    Args:
        values: the measure by arm.
        draws: the same for each resample, (count,), the same seeds in each for all arms.
        num_seeds: how many seeds there are.
        step: by what a measure that is counted in steps changes at least; no standard error is smaller than that of
            rounding two numbers to such steps, step / sqrt(6).
    """
    pairs = list(combinations(values, 2))
    known = [abs(value) for value in values.values() if math.isfinite(value)]
    floor = max(step / math.sqrt(6), _DUST * max(known, default=0.0))
    raw = []
    for first, second in pairs:
        drawn = draws[first] - draws[second]
        spread = math.inf
        if num_seeds >= 2 and np.isfinite(drawn).all():
            spread = float(drawn.std()) * math.sqrt(num_seeds / (num_seeds - 1))
        raw.append(_p_value(values[first] - values[second], max(spread, floor), num_seeds))
    corrected = holm(raw)
    return [
        Difference(
            first,
            second,
            values[first] - values[second],
            *interval(draws[first] - draws[second], num_seeds),
            p,
            told=p < LEVEL,
        )
        for (first, second), p in zip(pairs, corrected, strict=True)
    ]


def winner(values: dict[str, float], found: Sequence[Difference], higher_is_better: bool) -> str | None:
    """The best arm, if the seeds tell it from every other one; else None."""
    known = {arm: value for arm, value in values.items() if math.isfinite(value)}
    if len(known) < 2:
        return None
    best = (max if higher_is_better else min)(known, key=lambda arm: known[arm])
    against = [each for each in found if best in (each.first, each.second)]
    rivals = [each for each in against if {each.first, each.second} <= set(known)]
    return best if all(each.told for each in rivals) else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (Scand. J. Statist. 6, 1979): the same order, none smaller; NaN stays and is not counted."""
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    running = 0.0
    for rank, (p, index) in enumerate(known):
        running = max(running, min(1.0, p * (len(known) - rank)))
        corrected[index] = running
    return corrected


def student_t_p(t: float, degrees: int) -> float:
    """The two-sided p-value of Student's t for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    if math.isinf(t):
        return 0.0
    theta = math.atan(abs(t) / math.sqrt(degrees))
    cosine = math.cos(theta)
    odd = degrees % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    if degrees == 1:
        total = 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    return max(0.0, 1.0 - inside)


def _p_value(difference: float, standard_error: float, num_seeds: int) -> float:
    if num_seeds < MIN_SEEDS or not math.isfinite(difference):
        return math.nan
    if difference == 0:
        return 1.0
    return student_t_p(difference / standard_error if standard_error else math.inf, num_seeds - 1)
