"""One run folder, read once and kept small: how it began and ended, its worst moments, its curves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import RunFolderError
from trimtab.report.columns import read_columns
from trimtab.report.decimate import decimate
from trimtab.report.runlog import Floats, number, read_json

FORMAT = 1  # of run.json: the newest that can be read
_OF_WATCH = (
    *("format", "trimtab", "torch", "python", "platform", "machine", "cpus", "threads", "started", "every"),
    *("task", "parameters", "strategy", "processes", "arm", "recipe_name"),
)  # what run.json says of every run, and is no part of its recipe
_RECENT = 10  # logged losses, by whose median a spike is judged
_RISE = 0.2  # of the way that the loss has come: how far above that median a spike stands

Curve = tuple[Floats, Floats]


@dataclass(frozen=True)
class RunSummary:
    """What a report needs of one run. A number that is not known is NaN.

    Attributes:
        folder: where it lies.
        arm: what it is one of: "arm" of run.json, else the recipe's stabilizer, else the folder's name.
        lr: the recipe's learning rate; NaN for a run that was not told one.
        seed: the recipe's seed.
        status: that of result.json; "error" if it raised; "unfinished" if it has no result yet.
        error: what error.json says; "" if there is none.
        info: run.json.
        result: result.json.
        recipe: the recipe, as run.json has it.
        loss: the loss at the end: "eval_loss" where it is measured, else that of the last batch.
        initial_loss: the same before the first step.
        metric_name: the metric that decides, when it is another than the loss; else "".
        higher_is_better: whether more of the metric is better.
        metric: the metric at the end.
        initial_metric: the metric before the first step.
        entropy_min: the lowest attention entropy of any head at any logged step, over its maximum.
        max_logit: the largest attention logit of any head at any logged step.
        spikes: how often the logged loss jumped up; see `count_spikes`.
        alarms: every alarm, as logged, oldest first.
        steps: optimiser steps taken.
        step_seconds: the median time of a step.
        peak_memory: bytes.
        curves: steps and values by name, decimated so that spikes survive.
        notes: what was wrong with the folder and did no harm.
        group: what a run must have in common with others to be compared, name to value; see `collect`.
    """

    folder: Path
    arm: str
    lr: float
    seed: int
    status: str
    error: str
    info: dict[str, Any]
    result: dict[str, Any]
    recipe: dict[str, Any]
    loss: float
    initial_loss: float
    metric_name: str
    higher_is_better: bool
    metric: float
    initial_metric: float
    entropy_min: float
    max_logit: float
    spikes: int
    alarms: list[dict[str, Any]]
    steps: int
    step_seconds: float
    peak_memory: float
    curves: dict[str, Curve]
    notes: tuple[str, ...] = ()
    group: tuple[tuple[str, str], ...] = ()

    @property
    def ended(self) -> bool:
        """Whether there is an outcome: a result or an error."""
        return self.status != "unfinished"

    @property
    def failed(self) -> bool:
        """Whether it diverged, raised, or ended no better than it began."""
        if not self.ended:
            return False
        return self.status in ("diverged", "error") or not self.loss < _or(self.initial_loss, math.inf)


def read_summary(folder: Path, planned: Mapping[str, Any] | None = None) -> RunSummary:
    """Read one run folder, each file once.

    Args:
        folder: of one run.
        planned: what the run was to be ("arm", "recipe"), for one that raised before it wrote its run.json.

    Raises:
        RunFolderError: nothing can be said of the run: why.
    """
    error = read_json(folder / "error.json")
    said = f"{error.get('kind', 'error')}: {error.get('error', '')}" if error else ""
    info = read_json(folder / "run.json")
    if not info:
        if not (error and planned):
            raise RunFolderError(said or "it has no run.json")
        info = dict(planned)
    if number(info.get("format", FORMAT)) > FORMAT:
        raise RunFolderError(f"format {info['format']} of run.json is newer than {FORMAT}, the newest known here")
    recipe = info.get("recipe")
    if not isinstance(recipe, dict):  # a run of the user's own loop: what Watch was told of it
        recipe = {name: value for name, value in info.items() if name not in _OF_WATCH}
    result = read_json(folder / "result.json")
    columns, alarms, notes = read_columns(folder / "steps.jsonl")
    steps = columns.pop("step", np.empty(0))
    if not len(steps) and not error:
        raise RunFolderError("it has no logged step yet")
    notes += _check_arrays(folder, len(steps))
    loss, metric_name = columns.get("loss", np.empty(0)), str(result.get("metric") or _guess_metric(columns))
    if "loss" in metric_name:
        metric_name = ""
    first, last = _metrics(result, "initial"), _metrics(result, "metrics")
    final_loss = last.get("eval_loss", number(result.get("loss")))
    initial_loss = first.get("eval_loss", _first(columns.get("eval_loss" if "eval_loss" in last else "loss")))
    try:
        lr, seed = number(recipe.get("lr")), int(recipe.get("seed", info.get("seed", 0)))
    except (TypeError, ValueError):
        raise RunFolderError("its run.json has a learning rate or a seed that is no number") from None
    return RunSummary(
        folder=folder,
        arm=str(info.get("arm") or recipe.get("stabilizer") or folder.name),
        lr=lr,
        seed=seed,
        status="error" if error and not result else str(result.get("status", "unfinished")),
        error=said,
        info=info,
        result=result,
        recipe=recipe,
        loss=final_loss,
        initial_loss=initial_loss,
        metric_name=metric_name,
        higher_is_better=bool(result.get("higher_is_better", True)),
        metric=last.get(metric_name, math.nan),
        initial_metric=first.get(metric_name, math.nan),
        entropy_min=_extreme(columns.get("entropy_min"), np.fmin),
        max_logit=_extreme(columns.get("max_logit"), np.fmax),
        spikes=count_spikes(loss),
        alarms=alarms,
        steps=int(_or(number(result.get("steps")), float(steps[-1]) if len(steps) else 0.0)),
        step_seconds=number(result.get("step_seconds")),
        peak_memory=number(result.get("peak_memory_bytes")),
        curves={name: _from_start(decimate(steps, values), first.get(name)) for name, values in columns.items()},
        notes=tuple(notes),
    )


def _from_start(curve: Curve, initial: float | None) -> Curve:
    """The curve of a metric, begun at step 0 with its value before training."""
    steps, values = curve
    if initial is None or not math.isfinite(initial) or (len(steps) and steps[0] <= 0):
        return curve
    return np.insert(steps, 0, 0.0), np.insert(values, 0, initial)


def count_spikes(losses: Floats) -> int:
    """How often the logged loss jumps up: a rule of its own, the same for watched and unwatched runs.

    A spike begins at a loss that stands above the median of the ten before it by more than a fifth of the way that the
    loss had come down from its first value (or of half that value, if that is more), and lasts until it no longer does.
    A loss that is not finite is no spike: such a run has diverged.
    """
    finite = losses[np.isfinite(losses)]
    if len(finite) < _RECENT:
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(finite, _RECENT)[:-1]  # the ten before each, from the eleventh
    lowest = np.minimum.accumulate(finite)[_RECENT - 1 : -1]
    span = np.maximum(0.5 * abs(finite[0]), finite[0] - lowest)
    above = finite[_RECENT:] - np.median(windows, axis=1) > _RISE * span
    return int(above[:1].sum() + (above[1:] & ~above[:-1]).sum())


def _check_arrays(folder: Path, lines: int) -> list[str]:
    """A note when the per-head arrays are torn or missing."""
    try:
        heads = len(read_json(folder / "heads.json").get("heads", []))
    except RunFolderError:
        return ["heads.json is damaged: the per-head arrays cannot be read"]
    array = folder / "heads_entropy.f32"
    size = array.stat().st_size if array.is_file() else 0
    missing = lines - size // (4 * heads) if heads else 0
    return [f"heads_entropy.f32 is torn: it has no row for {missing} of {lines} lines"] if missing > 0 else []


def _guess_metric(columns: Mapping[str, Floats]) -> str:
    return "accuracy" if "accuracy" in columns else ""


def _metrics(result: Mapping[str, Any], name: str) -> dict[str, float]:
    found = result.get(name)
    if not isinstance(found, dict):  # a result.json older than its metrics by name
        found = {"accuracy": result["accuracy"]} if name == "metrics" and "accuracy" in result else {}
    return {str(key): number(value) for key, value in found.items()}


def _first(values: Floats | None) -> float:
    known = [] if values is None else [value for value in values if math.isfinite(value)]
    return float(known[0]) if known else math.nan


def _extreme(values: Floats | None, pick: np.ufunc) -> float:
    return float(pick.reduce(values)) if values is not None and len(values) else math.nan


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value
