"""What plain signals would do as alarms, each at its best bound in hindsight: the controls of alarms.py."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from alarm_failure import Case, median
from alarm_score import plain, score

from trimtab.report.runlog import Run

MOST_FALSE = 0.05
_LINES = 20  # logged lines before, over whose median a signal has grown
_FEWEST = 5
# Each signal is one number a line: the largest of those that the line holds.
_GROWING = {
    "gradient norm": "grad_norm",
    "activation RMS": "activation_rms",
    "output z": "output_z",
    "logit norm": "logit_norm",
    "update ratio": "update_ratio",
}


def controls(cases: Sequence[Case]) -> dict[str, Any]:
    """The level of the learning rate; the growth of every other signal, over the lines before and since the start."""
    found = {"learning rate": _control(cases, [_largest(case.log, "lr") for case in cases])}
    for name, entry in _GROWING.items():
        signals = [_largest(case.log, entry) for case in cases]
        found[f"{name}, over the lines before"] = _control(cases, [_growth(signal) for signal in signals])
        found[f"{name}, over the first line"] = _control(cases, [[v / signal[0] for v in signal] for signal in signals])
    return found


def _control(cases: Sequence[Case], signals: Sequence[Sequence[float]]) -> dict[str, Any]:
    """An alarm that is raised above a bound: the lowest with few enough false alarms, so the one of most recall."""
    tops = [max(signal) for case, signal in zip(cases, signals, strict=True) if case.outcome == "healthy"]
    bound = sorted(tops, reverse=True)[math.floor(MOST_FALSE * len(tops))]
    pairs = (zip(case.log.lines, signal, strict=True) for case, signal in zip(cases, signals, strict=True))
    alarms = [next((line["step"] for line, value in run if value > bound), None) for run in pairs]
    return {"bound": bound} | plain(score(cases, alarms))


def _largest(log: Run, name: str) -> list[float]:
    return [max(_numbers(line[name])) for line in log.lines]


def _numbers(entry: Any) -> list[float]:
    """The numbers of an entry of a log line, those that are not finite being the largest of all."""
    values = entry.values() if isinstance(entry, Mapping) else entry if isinstance(entry, list) else [entry]
    return [value if math.isfinite(value) else math.inf for value in map(float, values)]


def _growth(signal: Sequence[float]) -> list[float]:
    """A signal over the median of the lines before it; of two lines running the lower."""
    growth = [signal[i] / median(signal[max(0, i - _LINES) : i]) if i >= _FEWEST else 0.0 for i in range(len(signal))]
    return [0.0, *(min(pair) for pair in pairwise(growth))]
