"""What alarms are made of: a head, what was seen of it, and an alarm."""

import math
from dataclasses import dataclass
from typing import NamedTuple


class Head(NamedTuple):
    """One attention head: the dotted name of its module and its number, from 0."""

    module: str
    head: int

    def __str__(self) -> str:
        return f"{self.module} head {self.head}"


class Reading(NamedTuple):
    """What was seen of one head at one step; NaN where it was not seen.

    Attributes:
        entropy: attention entropy, nats, mean over the queries.
        normalized: the same over its maximum, 0 to 1.
        max_logit: largest attention logit.
        logit_norm: mean norm of a query's logits about their mean.
        bound: nats: the least entropy that logits of that norm allow, mean over the queries.
    """

    entropy: float
    normalized: float
    max_logit: float
    logit_norm: float = math.nan
    bound: float = math.nan

    @property
    def broken(self) -> bool:
        """Whether the logits are not finite.

        Not so are a head that sees no key, whose largest logit is -inf, and one of which only the entropy was seen.
        """
        return self.max_logit == math.inf or (math.isnan(self.max_logit) and math.isnan(self.entropy))


@dataclass(frozen=True)
class Alarm:
    """Something a reader of the log should look at.

    Attributes:
        step: the step at which it was raised.
        kind: what it is about: one of `trimtab.watch.alarms.KINDS`.
        where: the worst place: a head, a weight, or "loss".
        since: the logged step from which on it has been so there.
        value: the number that raised it; which one depends on the kind, see `Thresholds`.
        confidence: 0 to 1: of the calibration runs with this kind of alarm, how many did not end well; NaN for a kind
            that none of them raised.
        message: one paragraph: what was seen, where, since when, how sure, and what to do next.
    """

    step: int
    kind: str
    where: str
    since: int
    value: float
    confidence: float
    message: str
