"""Tuning as forecasting.py and forecast_toy.py do it: strokes of settings, and on outwards from where they end."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.train.compare.grid import RunPlace
from trimtab.train.compare.running import finished

SEED = 0  # of all runs that choose
Setting = dict[str, Any]
Tried = tuple[Setting, float]
"""A setting and its validation error."""
Stroke = Callable[[str, Setting | None], Sequence[Setting]]
"""Of an arm's name and its best setting so far (None at first): what is tried next."""


def tune(
    names: Sequence[str],
    strokes: Sequence[Stroke],
    plan: Callable[[str, Setting], RunPlace],
    run: Callable[[Sequence[RunPlace]], None],
    outwards: int,
) -> dict[str, list[Tried]]:
    """The settings of each arm and their validation errors, all arms at a time in every stroke.

    Args:
        names: of the arms.
        strokes: one after the other.
        plan: the run of an arm's setting.
        run: trains runs.
        outwards: at most so many strokes more, from an edge.
    """
    tried: dict[str, list[Tried]] = {name: [] for name in names}

    def take(chosen: Mapping[str, Sequence[Setting]]) -> None:
        places = {name: [plan(name, setting) for setting in each] for name, each in chosen.items()}
        run([place for each in places.values() for place in each])
        for name, each in chosen.items():
            tried[name] += zip(each, map(validation_mse, places[name]), strict=True)

    for stroke in strokes:
        take({name: stroke(name, best(tried[name]) if tried[name] else None) for name in names})
    for _ in range(outwards):
        further = {name: beyond([setting for setting, _ in tried[name]], best(tried[name])) for name in names}
        if not any(further.values()):
            break
        take(further)
    return tried


def best(tried: Sequence[Tried]) -> Setting:
    """The first of those with the lowest validation error."""
    return min(tried, key=lambda each: each[1])[0]


def beyond(tried: Sequence[Setting], best: Setting) -> list[Setting]:
    """What is tried next because the best stands at an edge: twice the largest radius or rate, half the smallest."""
    found = []
    for name in ("rho", "lr"):
        values = [each.get(name, 1.0) for each in tried]
        value = best.get(name, 1.0)
        if min(values) < max(values) and value in (min(values), max(values)):
            found.append(best | {name: round(value * (2 if value == max(values) else 0.5), 6)})
    return found


def validation_mse(place: RunPlace) -> float:
    """Of the weights that the run kept; of one that failed, above all others."""
    result = finished(place)
    return result.metrics.get("mse", float("inf")) if result and result.status != "diverged" else float("inf")


def told(tried: Sequence[Tried]) -> list[dict[str, Any]]:
    """What was tried, as results have it."""
    return [{"setting": setting, "validation_mse": value} for setting, value in tried]
