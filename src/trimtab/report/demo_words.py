"""The sentences under the demo's pictures, computed from the runs, whatever they say."""

from collections.abc import Sequence
from statistics import median

import numpy as np

from trimtab.report.demo_arms import (
    ARMS,
    BASELINE,
    STEADIED,
    accuracy,
    diverged,
    learning_rates,
    of_arm,
    seed,
)
from trimtab.report.runlog import Run

COLLAPSED = 0.03
"""A head counts as collapsed when its entropy is below this share of its maximum, log(keys)."""

TIE = 0.01
"""Median accuracies closer than this are called level: one test image in 360 is 0.003."""


def curves_sentence(runs: Sequence[Run], lr: float) -> str:
    """What happened at one learning rate: the accuracy of every seed, and which arm is ahead."""
    ends = {arm: [accuracy(run) for run in of_arm(runs, arm, lr)] for arm in ARMS}
    listed = "; ".join(f"{arm.name} {_and([f'{end:.3f}' for end in ends[arm]])}" for arm in ARMS)
    seeds = _and([str(seed(run)) for run in of_arm(runs, BASELINE, lr)])
    difference = median(ends[STEADIED]) - median(ends[BASELINE])
    ahead, behind = (STEADIED, BASELINE) if difference > 0 else (BASELINE, STEADIED)
    if min(ends[ahead]) > max(ends[behind]):
        verdict = f"Every run of {ahead.name} ends above every run of {behind.name}."
    elif abs(difference) < TIE:
        verdict = "The two are level."
    else:
        verdict = f"{ahead.name} has the higher median, but the runs overlap."
    lost = [f"{count} of {arm.name}" for arm in ARMS if (count := sum(map(diverged, of_arm(runs, arm, lr))))]
    note = f" Stopped because the loss was no longer finite: {_and(lost)}." if lost else ""
    return f"Test accuracy at the end, with seeds {seeds}: {listed}. {verdict}{note}"


def entropy_sentence(runs: Sequence[Run], lr: float) -> str:
    """How many heads of each arm end collapsed at one learning rate, and which arm has more of them."""
    counts = {arm: _collapsed(of_arm(runs, arm, lr)) for arm in ARMS}
    if not all(total for _, total in counts.values()):
        return "The attention of at least one side was not seen, so the two cannot be compared."
    share = {arm: collapsed / total for arm, (collapsed, total) in counts.items()}
    if share[BASELINE] == share[STEADIED]:
        verdict = "The two collapse alike." if share[BASELINE] else "Neither collapses."
    else:
        more = BASELINE if share[BASELINE] > share[STEADIED] else STEADIED
        verdict = f"It is {more.name} that collapses more."
    heads = _and([f"{counts[arm][0]} of {counts[arm][1]} heads of {arm.name}" for arm in ARMS])
    seeds = _and([str(seed(run)) for run in of_arm(runs, BASELINE, lr)])
    return (
        "At 1 a head looks at all patches alike, at 0 at a single one. At the end, over seeds "
        f"{seeds}, {heads} are below {COLLAPSED:g}. {verdict}"
    )


def sweep_sentence(runs: Sequence[Run]) -> str:
    """Where the stabilizer wins, where it loses, and how the arms compare at their own best learning rates."""
    rates = learning_rates(runs)
    middle = {arm: [median(map(accuracy, of_arm(runs, arm, lr))) for lr in rates] for arm in ARMS}
    differences = dict(zip(rates, np.subtract(middle[STEADIED], middle[BASELINE]), strict=True))
    outcome = {
        "wins": [lr for lr, difference in differences.items() if difference >= TIE],
        "loses": [lr for lr, difference in differences.items() if difference <= -TIE],
        "is level": [lr for lr, difference in differences.items() if abs(difference) < TIE],
    }
    parts = [f"{verb} at {_and([f'{lr:g}' for lr in where])}" for verb, where in outcome.items() if where]
    signed = {lr: f"{difference:+.3f}".replace("-", "−") for lr, difference in differences.items()}
    numbers = _and([f"{difference} at {lr:g}" for lr, difference in signed.items()])
    best = {arm: max(zip(middle[arm], rates, strict=True)) for arm in ARMS}
    bests = _and([f"{best[arm][0]:.3f} for {arm.name} (at {best[arm][1]:g})" for arm in ARMS])
    gap = best[STEADIED][0] - best[BASELINE][0]
    if abs(gap) < TIE:
        verdict = "tuned, the two are level"
    else:
        verdict = f"tuned, {(STEADIED if gap > 0 else BASELINE).name} is ahead"
    return (
        f"By the median, {STEADIED.name} {_and(parts)} (accuracy over that of {BASELINE.name}: {numbers}). "
        f"Each at the best learning rate of these {len(rates)}: {bests}; {verdict}."
    )


def _collapsed(runs: Sequence[Run]) -> tuple[int, int]:
    """Heads that are collapsed at the last logged step, and heads seen then, over the runs."""
    last = np.concatenate([run.entropy_normalized[-1] for run in runs])  # (runs * heads,)
    return int((last < COLLAPSED).sum()), int(np.isfinite(last).sum())


def _and(parts: Sequence[str]) -> str:
    """Join with commas and a last "and"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
