"""What is out of bounds on one logged line: one pure function per kind of alarm."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from trimtab.watch.alarms.records import Head, Reading
from trimtab.watch.alarms.thresholds import Thresholds
from trimtab.watch.signals.losses import spike_score

SMOOTHING = 5  # logged losses in the running median by which divergence is judged


class Finding(NamedTuple):
    """What one rule found on one line.

    Attributes:
        out: the places that are out of bounds, each with the number that says so.
        when: (places, lines): an alarm is raised when so many places have been out for so many logged steps running;
            the first of several that applies; without any it is not raised on this line.
        total: how many places were looked at.
        lowest_is_worst: whether the worst place is the one with the lowest number.
    """

    out: dict[str, float]
    when: tuple[tuple[int, int], ...] = ((1, 1),)
    total: int = 1
    lowest_is_worst: bool = False


Readings = Mapping[Head, Reading]


def collapse(readings: Readings, thresholds: Thresholds) -> Finding:
    """Heads that attend to almost one key each; what counts is the share of them."""
    bound = thresholds.collapse_entropy
    out = {} if bound is None else {str(head): r.normalized for head, r in readings.items() if r.normalized < bound}
    when = (_share(thresholds.collapse_share, len(readings)), thresholds.lines)
    return Finding(out, (when,), len(readings), lowest_is_worst=True)


def logit_growth(readings: Readings, thresholds: Thresholds) -> Finding:
    """Heads with a logit so large that the softmax over it hardly passes a gradient."""
    bound = thresholds.max_logit
    out = {} if bound is None else {str(head): r.max_logit for head, r in readings.items() if r.max_logit > bound}
    return Finding(out, ((1, thresholds.lines),), len(readings))


def sigma_growth(
    step: int, sigmas: Mapping[str, float], past: Sequence[tuple[int, Mapping[str, float]]], thresholds: Thresholds
) -> Finding:
    """Weights whose spectral norm grows fast; what counts is the share of them.

    Args:
        step: this step.
        sigmas: sigma by weight.
        past: earlier steps with their sigmas, oldest first.
        thresholds: see there.
    """
    bound, window = thresholds.sigma_growth, thresholds.sigma_steps
    grown: dict[str, float] = {}
    for then, before in past:
        # over more than the window (a log with few lines) the same speed has had longer to act
        root = min(1.0, window / max(1, step - then))
        for name, sigma in sigmas.items():
            if before.get(name, math.nan) < math.inf and sigma < math.inf:
                ratio = max(sigma, 1.0) / max(before[name], 1.0)
                grown[name] = max(grown.get(name, 1.0), ratio**root)
    out = {} if bound is None else {name: value for name, value in grown.items() if value > bound}
    when = (_share(thresholds.sigma_share, len(grown)), thresholds.lines)
    return Finding(out, (when,), len(grown))


def large_updates(line: Mapping[str, Any], change: float, thresholds: Thresholds) -> Finding:
    """Weights that one step changed by a large part of themselves; what counts is their share of all weights.

    Args:
        line: a logged line.
        change: see `loss_change`. Only while the loss rises is the alarm raised: weights that start small change by
            much in their first steps, and learn.
        thresholds: see there.
    """
    bound, ratios, converted = thresholds.update_ratio, line.get("update_ratio", {}), line.get("gamma", {})
    out = {name: float(ratio) for name, ratio in ratios.items() if name not in converted}
    out = {} if bound is None else {name: ratio for name, ratio in out.items() if ratio > bound}
    when = (math.floor(thresholds.update_share * len(ratios)) + 1, thresholds.lines)
    return Finding(out, (when,) if change > thresholds.loss_change else (), len(ratios))


def spike(loss: float, losses: Sequence[float], span: float, thresholds: Thresholds) -> Finding:
    """A finite loss far above those just before it, in their own spread and in the run's span."""
    bound = thresholds.spike_score
    recent = [value for value in losses if math.isfinite(value)]
    if bound is None or not math.isfinite(loss) or 2 * len(recent) < thresholds.spike_lines:
        return Finding({})
    rises = loss - median(recent) > thresholds.spike_rise * span
    return Finding({"loss": loss} if rises and spike_score(recent, loss) > bound else {})


def loss_change(losses: Sequence[float], span: float) -> float:
    """The way of the loss from the older half of some losses to the newer, in spans: negative where it falls.

    Each half counts by its median. NaN when there are fewer than two losses, or no span.
    """
    half = len(losses) // 2
    return (median(losses[half:]) - median(losses[:half])) / span if half and span else math.nan


def divergence(smooth: float, lowest: float, span: float, thresholds: Thresholds) -> Finding:
    """A loss that has come back up; `smooth` and `lowest` are running medians, NaN while there is none."""
    bound = thresholds.divergence_rise
    out = {"loss": smooth} if bound is not None and smooth - lowest > bound * span > 0 else {}
    return Finding(out, ((1, thresholds.lines),))


def dead(readings: Readings, learns: bool, began_so: bool, thresholds: Thresholds) -> Finding:
    """Heads that look at every key alike: many of them for some time, or one for long.

    Args:
        readings: what was seen of the heads.
        learns: whether the loss falls or the learning rate is being warmed up: then the alarm is not raised.
        began_so: whether many were dead on the first line, as with small weights: then many are given as long as one.
        thresholds: see there.
    """
    many = (_share(thresholds.dead_share, len(readings)), thresholds.dead_lines)
    one = (1, thresholds.dead_lines_one)
    return Finding(_dead(readings, thresholds), () if learns else (one,) if began_so else (many, one), len(readings))


def many_dead(readings: Readings, thresholds: Thresholds) -> bool:
    """Whether so many heads look at every key alike that "dead head" may be raised for their number."""
    return len(_dead(readings, thresholds)) >= _share(thresholds.dead_share, len(readings))


def non_finite(line: Mapping[str, Any], readings: Readings, thresholds: Thresholds) -> Finding:
    """NaN or inf in the loss, the gradients, the attention logits or the weights."""
    out = {name: float(line[name]) for name in ("loss", "grad_norm") if name in line and not _finite(line[name])}
    out |= {f"logits of {head}": r.max_logit for head, r in readings.items() if r.broken}
    out |= {name: sigma for name, sigma in effective_sigmas(line).items() if not math.isfinite(sigma)}
    # Gradients alone may be those of a step that a GradScaler skips, as it does now and then: no harm is done.
    lines = thresholds.lines if set(out) == {"grad_norm"} else 1
    return Finding(out, ((1, lines),), len(out))


def effective_sigmas(line: Mapping[str, Any]) -> dict[str, float]:
    """The largest spectral norm among the blocks of each weight in use: abs(gamma) of a converted one, else sigma."""
    gammas = line.get("gamma", {})
    return {name: _largest(gammas.get(name, sigmas)) for name, sigmas in line.get("sigma", {}).items()}


def _dead(readings: Readings, thresholds: Thresholds) -> dict[str, float]:
    bound = thresholds.dead_entropy
    return {} if bound is None else {str(head): r.normalized for head, r in readings.items() if r.normalized > bound}


def _share(share: float, total: int) -> int:
    return max(1, math.ceil(share * total))


def _largest(values: Sequence[float]) -> float:
    sizes = [abs(float(value)) for value in values]
    return math.nan if any(map(math.isnan, sizes)) else max(sizes, default=math.nan)


def _finite(value: Any) -> bool:
    return math.isfinite(float(value))
