"""Which runs failed and when: decided from the loss alone, as the docstring of alarms.py says."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alarm_runs import Planned
from small_tasks import TASKS

from trimtab.report.runlog import Run


@dataclass(frozen=True)
class Case:
    """One run, judged.

    Attributes:
        plan: what was trained.
        steps: optimiser steps of the whole run.
        log: what was logged.
        outcome: "healthy", "impaired" or "failed".
        way: share of the way from chance to best that its final loss has come.
        failed_at: the step at which it failed, if it did.
    """

    plan: Planned
    steps: int
    log: Run
    outcome: str
    way: float
    failed_at: int | None


def judge(task: str, logs: Mapping[Planned, Run]) -> list[Case]:
    """Decide from the losses alone how the runs of one task ended, and when the failed ones failed."""
    losses = {plan: [float(line["loss"]) for line in log.lines] for plan, log in logs.items()}
    final = {plan: _final(values) for plan, values in losses.items()}
    smooth = {
        plan: [median(values[max(0, i - 4) : i + 1]) for i in range(len(values))] for plan, values in losses.items()
    }
    chance, best = TASKS[task].chance, min(final.values())
    margin = (chance - best) / 4
    way = {plan: (chance - value) / (chance - best) for plan, value in final.items()}
    healthy = [plan for plan in logs if way[plan] >= 0.75]
    highest = [max(column) for column in zip(*(smooth[plan] for plan in healthy), strict=True)]
    cases = []
    for plan, log in logs.items():
        outcome = "healthy" if way[plan] >= 0.75 else "impaired" if way[plan] >= 0.5 else "failed"
        failed_at = None
        if outcome == "failed":
            lines = [
                next((i for i, loss in enumerate(losses[plan]) if not math.isfinite(loss)), math.inf),
                _stays_above(smooth[plan], [bound + margin for bound in highest]),
                _stays_above(smooth[plan], [bound + margin for bound in _lowest_so_far(smooth[plan])]),
            ]
            failed_at = int(log.steps[int(min(lines))])
        cases.append(Case(plan, TASKS[task].steps, log, outcome, way[plan], failed_at))
    return cases


def _final(losses: Sequence[float]) -> float:
    return median(losses[-max(1, len(losses) // 10) :])


def median(losses: Sequence[float]) -> float:
    """The median, losses that are not finite being the largest of all."""
    return statistics.median(loss if math.isfinite(loss) else math.inf for loss in losses)


def _smooth(losses: Sequence[float]) -> list[float]:
    return [median(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]


def _lowest_so_far(values: Sequence[float]) -> list[float]:
    return [min(values[: i + 1]) for i in range(len(values))]


def _stays_above(values: Sequence[float], bounds: Sequence[float]) -> float:
    """The first line from which on the values stay above the bounds; inf when they end below."""
    first = math.inf
    for i in reversed(range(len(values))):
        if not values[i] > bounds[i]:
            break
        first = i
    return first
