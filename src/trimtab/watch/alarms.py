"""Alarms: what a reader of the log should look at, and what to do about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Head(NamedTuple):
    """One attention head: the dotted name of its module and its number, from 0."""

    module: str
    head: int

    def __str__(self) -> str:
        return f"{self.module} head {self.head}"


class Reading(NamedTuple):
    """What was seen of one head at one step: entropy in nats, the same over its maximum (0 to 1), largest logit."""

    entropy: float
    normalized: float
    max_logit: float


@dataclass(frozen=True)
class Alarm:
    """Something a reader of the log should look at.

    Attributes:
        step: the step at which it was raised.
        kind: what it is about, e.g. "entropy collapse".
        where: module and head, e.g. "blocks.2.attention head 3".
        value: the number that raised it; of an entropy collapse the normalised entropy, 0 to 1.
        message: one paragraph: what was seen, since when, and what to do next.
    """

    step: int
    kind: str
    where: str
    value: float
    message: str


class CollapseAlarm:
    """Raised for a head whose normalised entropy lies below a threshold at two logged steps running, once per head.

    In sigma-Reparam's account (Zhai et al., ICML 2023, arXiv 2303.06296) attention entropy falls towards 0 before a
    Transformer diverges. Two steps, because one batch proves little. It says where to look, not that the run is
    lost: heads that have learned to copy one token have low entropy too.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._since: dict[Head, int] = {}
        self._raised: set[Head] = set()

    def check(self, step: int, loss: float, readings: Mapping[Head, Reading]) -> list[Alarm]:
        """Take in one logged step; return the alarms it raises."""
        alarms = []
        for head, reading in readings.items():
            if not reading.normalized < self._threshold:  # NaN is not low
                self._since.pop(head, None)
                continue
            since = self._since.setdefault(head, step)
            if since < step and head not in self._raised:
                self._raised.add(head)
                alarms.append(self._alarm(step, since, loss, head, reading))
        return alarms

    def _alarm(self, step: int, since: int, loss: float, head: Head, reading: Reading) -> Alarm:
        message = (
            f"step {step}: entropy collapse in {head}: {reading.entropy:.3g} nats, {reading.normalized:.2g} of its "
            f"maximum, below {self._threshold:g} of it since step {since}; largest logit {reading.max_logit:.4g}. "
            f"Low entropy alone is not failure. If the loss, {loss:.4g} now, rises or stalls: lower the learning rate, "
            "warm it up, or convert the model with tt.reparametrize_."
        )
        return Alarm(step, "entropy collapse", str(head), reading.normalized, message)
