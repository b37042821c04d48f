"""`Alarms`: from logged lines to alarms, the same way wherever the same lines are read."""

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

from trimtab.watch.alarms import rules
from trimtab.watch.alarms.messages import message
from trimtab.watch.alarms.records import Alarm, Head, Reading
from trimtab.watch.alarms.rules import SMOOTHING, Finding
from trimtab.watch.alarms.thresholds import CONFIDENCE, Thresholds

_AGAIN = 4  # a kind is raised again when so many times as many places are out of bounds
_FLAT = 0.5  # the span of a loss that has not fallen yet is this share of its first value


class Alarms:
    """Decides, one logged line after another, which alarms are raised.

    It reads the lines and nothing else and draws no random number: processes that see the same lines raise the same
    alarms, and so does one that goes on from another's `state`.

    A place (a head, a weight, the loss) that is out of bounds is told of once. When several are, one alarm names the
    worst and counts them; the same kind is raised again only when four times as many are out of bounds, and "loss
    spike" also when a spike is over and another comes.

    Args:
        thresholds: when each alarm is raised.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self._first_loss = self._lowest = math.nan
        self._losses: list[float] = []
        self._past_sigmas: list[tuple[int, dict[str, float]]] = []  # (step, sigma by weight), oldest first
        self._streaks: dict[str, dict[str, tuple[int, int]]] = {}  # kind -> place -> (since, lines running)
        self._lr = math.nan  # the largest of the last line
        self._began_dead: bool | None = None  # whether many heads were dead when heads were first seen
        self._energies: dict[str, float] = {}  # the last qk_energy of every head: it is not on every line
        self._told: dict[str, int] = {}  # kind -> places out of bounds when it was last raised

    def check(self, step: int, line: Mapping[str, Any], readings: Mapping[Head, Reading]) -> list[Alarm]:
        """Take in one logged line and what was seen of the heads; return the alarms that it raises."""
        for module, energies in line.get("qk_energy", {}).items():
            self._energies |= {str(Head(module, i)): float(energy) for i, energy in enumerate(energies)}
        alarms = []
        for kind, finding in self._findings(step, line, readings).items():
            raised = self._raise(step, kind, finding)
            if raised is not None:
                alarms.append(raised)
        return alarms

    def state(self) -> dict[str, Any]:
        """What was remembered so far, in plain values that JSON can hold."""
        return {
            "first_loss": self._first_loss,
            "lowest": self._lowest,
            "losses": list(self._losses),
            "past_sigmas": [[step, dict(sigmas)] for step, sigmas in self._past_sigmas],
            "streaks": {
                kind: {place: list(run) for place, run in runs.items()} for kind, runs in self._streaks.items()
            },
            "lr": self._lr,
            "began_dead": self._began_dead,
            "energies": dict(self._energies),
            "told": dict(self._told),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; its numbers may have been written as text ("nan") by a run log."""
        self._first_loss, self._lowest = float(state["first_loss"]), float(state["lowest"])
        self._losses = [float(loss) for loss in state["losses"]]
        self._past_sigmas = [
            (step, {name: float(sigma) for name, sigma in sigmas.items()}) for step, sigmas in state["past_sigmas"]
        ]
        self._streaks = {
            kind: {place: (since, lines) for place, (since, lines) in runs.items()}
            for kind, runs in state["streaks"].items()
        }
        self._lr, self._began_dead = float(state["lr"]), state["began_dead"]
        self._energies = {head: float(energy) for head, energy in state["energies"].items()}
        self._told = dict(state["told"])

    def _findings(self, step: int, line: Mapping[str, Any], readings: Mapping[Head, Reading]) -> dict[str, Finding]:
        sigmas = rules.effective_sigmas(line)
        past = self._past_sigmas
        self._past_sigmas = self._with(step, sigmas)
        before = list(self._losses)
        loss = float(line["loss"])
        smooth = self._take_in(loss)
        # In this order: there is no lowest loss at first, and of a number and NaN max takes the first.
        span = max(_FLAT * abs(self._first_loss), self._first_loss - self._lowest)
        change = rules.loss_change(self._losses, span)
        limits = self.thresholds
        last_lr, self._lr = self._lr, max(map(float, line.get("lr", [])), default=math.nan)
        learns = change < -limits.loss_change or self._lr > last_lr
        if readings and self._began_dead is None:
            self._began_dead = rules.many_dead(readings, limits)
        return {
            "non-finite": rules.non_finite(line, readings, limits),
            "divergence": rules.divergence(smooth, self._lowest, span, limits),
            "loss spike": rules.spike(loss, before, span, limits),
            "entropy collapse": rules.collapse(readings, limits),
            "logit growth": rules.logit_growth(readings, limits),
            "sigma growth": rules.sigma_growth(step, sigmas, past, limits),
            "large updates": rules.large_updates(line, change, limits),
            "dead head": rules.dead(readings, learns, bool(self._began_dead), limits),
        }

    def _take_in(self, loss: float) -> float:
        """Remember a loss; return the running median, NaN before there are enough losses."""
        if not math.isfinite(loss):
            return math.nan
        if math.isnan(self._first_loss):
            self._first_loss = loss
        self._losses = [*self._losses, loss][-max(self.thresholds.spike_lines, SMOOTHING) :]
        if len(self._losses) < SMOOTHING:
            return math.nan
        smooth = median(self._losses[-SMOOTHING:])
        self._lowest = smooth if math.isnan(self._lowest) else min(self._lowest, smooth)
        return smooth

    def _with(self, step: int, sigmas: dict[str, float]) -> list[tuple[int, dict[str, float]]]:
        """The sigmas of the last `sigma_steps` steps and these: about ten entries, so that the state stays small."""
        window, past = self.thresholds.sigma_steps, self._past_sigmas
        if not sigmas or (past and step - past[-1][0] < window / 10):
            return past
        return [*(entry for entry in past if step - entry[0] < window), (step, sigmas)]

    def _raise(self, step: int, kind: str, finding: Finding) -> Alarm | None:
        old = self._streaks.get(kind, {})
        runs = {place: old.get(place, (step, 0)) for place in finding.out}
        self._streaks[kind] = runs = {place: (since, lines + 1) for place, (since, lines) in runs.items()}
        if kind == "loss spike" and not runs:
            self._told[kind] = 0
        for places, lines in finding.when:
            ripe = {place: value for place, value in finding.out.items() if runs[place][1] >= lines}
            if len(ripe) >= max(places, _AGAIN * self._told.get(kind, 0)):
                break
        else:
            return None
        self._told[kind] = len(ripe)
        sign = -1 if finding.lowest_is_worst else 1
        # NaN is the worst of all; among equals the name decides, not the order in which they came
        worst = max(ripe, key=lambda place: (math.isnan(ripe[place]), sign * ripe[place], place))
        since, value = runs[worst][0], ripe[worst]
        confidence = CONFIDENCE.get(kind, math.nan)
        alarm = Alarm(step, kind, worst, since, value, confidence, message="")
        text = message(alarm, len(ripe), finding.total, self.thresholds, self._energies.get(worst))
        return replace(alarm, message=text)
