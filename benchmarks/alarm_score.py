"""How well first alarms predict failures."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from alarm_failure import Case


@dataclass(frozen=True)
class Score:
    """How a set of first alarms does on a set of runs; shares are NaN when there is no run to count.

    Attributes:
        failed: how many runs failed.
        healthy: how many were healthy.
        recall: share of the failed runs whose alarm came at an earlier logged step than the failure.
        recall_later: the same among runs that failed after their first twentieth.
        false_alarms: share of the healthy runs with an alarm.
        lead_steps: median of the steps from alarm to failure, over the failures that were predicted.
        lead_share: the same as a share of the run.
        late: failed runs whose first alarm came with the failure or after it.
    """

    failed: int
    healthy: int
    recall: float
    recall_later: float
    false_alarms: float
    lead_steps: float
    lead_share: float
    late: int


def score(cases: Sequence[Case], alarms: Sequence[int | None]) -> Score:
    """Score the first alarm of each run (None: no alarm). The median lead is over the failures that were predicted."""
    failed = [(case, alarm) for case, alarm in zip(cases, alarms, strict=True) if case.failed_at is not None]
    healthy = [alarm for case, alarm in zip(cases, alarms, strict=True) if case.outcome == "healthy"]
    leads = [(case.failed_at - alarm, case.steps) for case, alarm in failed if case.failed_at and alarm is not None]
    early = [(lead, lead / steps) for lead, steps in leads if lead > 0]
    later = [(case.failed_at, alarm) for case, alarm in failed if case.failed_at and case.failed_at > case.steps / 20]
    return Score(
        failed=len(failed),
        healthy=len(healthy),
        recall=len(early) / len(failed) if failed else math.nan,
        recall_later=sum(alarm is not None and alarm < at for at, alarm in later) / len(later) if later else math.nan,
        false_alarms=sum(alarm is not None for alarm in healthy) / len(healthy) if healthy else math.nan,
        lead_steps=statistics.median(lead for lead, _ in early) if early else math.nan,
        lead_share=statistics.median(share for _, share in early) if early else math.nan,
        late=len(leads) - len(early),
    )


def plain(found: Score) -> dict[str, float | None]:
    """What JSON holds of a score: None for NaN, three decimals."""
    return {name: None if value != value else round(value, 3) for name, value in asdict(found).items()}
