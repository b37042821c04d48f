"""One log of several processes: what each of them saw of a step becomes one line, the same on all of them.

So alarms, which are decided from that line alone, are decided the same way everywhere.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from trimtab.watch.alarms import Head, Reading
from trimtab.watch.taps.gradients import MicroBatches

Result = TypeVar("Result")


class Sight(NamedTuple):
    """What was seen of a step by one process, or by several.

    Attributes:
        line: entries of the log line.
        readings: of each head.
        micro_batches: of each process that could tell its micro-batches' gradients apart.
    """

    line: dict[str, Any]
    readings: dict[Head, Reading]
    micro_batches: Sequence[MicroBatches] = ()


class Ranks:
    """The processes that watch one model together, each of them with a Watch of its own.

    Args:
        group: of torch.distributed; None is the default group, when there is one.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        several = dist.is_available() and dist.is_initialized()
        self.size: int = dist.get_world_size(group) if several else 1
        self.rank: int = 0 if self.size == 1 else dist.get_rank(group)
        self.first: bool = self.rank == 0

    def together(self, sight: Sight) -> Sight:
        """The sight of all processes; all of them must ask for the same step."""
        return combine(self.gather(sight))

    def first_does(self, work: Callable[[], None]) -> None:
        """Let the first process do something; its error is raised in all of them, so that none is left waiting."""
        self.all_do(work if self.first else lambda: None)

    def all_do(self, work: Callable[[], Result]) -> Result:
        """Do something in every process; an error in one is raised in all of them, so that none is left waiting."""
        error, found = None, []
        try:
            found.append(work())
        except Exception as caught:
            error = caught
        errors = [caught for caught in self.gather(error) if caught is not None]
        if errors:
            raise errors[0]
        return found[0]

    def gather(self, mine: Any) -> list[Any]:
        """What each process gives, in their order; all of them must give something."""
        if self.size == 1:
            return [mine]
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, mine, group=self._group)
        return everyones


def combine(sights: Sequence[Sight]) -> Sight:
    """One sight of several: numbers are averaged, largest logits maxed, names united in the order first met.

    An entry that not all processes saw is averaged over those that did: a stage of a pipeline speaks for its own
    layers. NaN in one process stays NaN, so that nothing broken is averaged away.
    """
    if len(sights) == 1:
        return sights[0]
    heads = dict.fromkeys(head for sight in sights for head in sight.readings)
    readings = {
        head: _combine_readings([sight.readings[head] for sight in sights if head in sight.readings]) for head in heads
    }
    micro_batches = [each for sight in sights for each in sight.micro_batches]
    return Sight(_combine_entries([sight.line for sight in sights]), readings, micro_batches)


def _combine_readings(readings: Sequence[Reading]) -> Reading:
    """NaN of a broken head stays; else it is a number that head did not have in that process's batch."""
    broken = any(each.broken for each in readings)
    means = [mean_of_seen(values, broken=broken) for values in zip(*readings, strict=True)]
    largest = largest_of_seen([each.max_logit for each in readings], broken=broken)
    return Reading(*means)._replace(max_logit=largest)


def mean_of_seen(values: Sequence[float], *, broken: bool) -> float:
    """Mean of the numbers that were seen; NaN if none was, or if one that is NaN is broken."""
    return _mean([value for value in values if broken or not math.isnan(value)])


def largest_of_seen(values: Sequence[float], *, broken: bool) -> float:
    """Largest of the numbers that were seen; NaN if none was, or if one is broken."""
    return math.nan if broken else max((value for value in values if not math.isnan(value)), default=math.nan)


def of_all_heads(readings: Mapping[Head, Reading]) -> dict[str, float]:
    """The numbers that all heads make together, for the line of a step."""
    if not readings:
        return {}
    entropy, normalized, max_logit, logit_norm, bound = zip(*readings.values(), strict=True)
    broken = any(head.broken for head in readings.values())
    found = {
        # Of heads without a number (no query has a choice, or NaN) there is no minimum; the logits show NaN.
        "entropy_min": min((value for value in normalized if value >= 0), default=math.nan),
        "entropy_mean": mean_of_seen(entropy, broken=broken),
        "entropy_bound": mean_of_seen(bound, broken=broken),
        "max_logit": largest_of_seen(max_logit, broken=broken),
        "logit_norm": mean_of_seen(logit_norm, broken=broken),
    }
    return {name: value for name, value in found.items() if broken or not math.isnan(value)}


def _combine_entries(entries: Sequence[Any]) -> Any:
    """Mappings and lists entry by entry, numbers by their mean; anything else is the first process's."""
    first = entries[0]
    if isinstance(first, Mapping):
        names = dict.fromkeys(name for entry in entries for name in entry)
        return {name: _combine_entries([entry[name] for entry in entries if name in entry]) for name in names}
    if isinstance(first, list) and all(len(entry) == len(first) for entry in entries):
        return [_combine_entries(values) for values in zip(*entries, strict=True)]
    if isinstance(first, float):
        return _mean(entries)
    return first


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
