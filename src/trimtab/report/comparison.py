"""Runs that can be compared, laid out as arms × seeds × learning rates."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from trimtab.report.collect import Collection
from trimtab.report.runlog import Floats
from trimtab.report.summary import RunSummary


@dataclass(frozen=True)
class Grid:
    """The outcomes of one arm, each array (S, L): seeds × learning rates of the comparison; NaN where not known.

    Attributes:
        loss: the final loss, or the loss at init where that is lower or the run failed.
        initial_loss: the loss before the first step.
        metric: the final metric, or that before the first step where the run failed.
        failed: 1 where the run diverged, raised, or ended no better than it began, else 0.
        entropy_min: the lowest entropy of the run, 0 to 1.
        max_logit: the largest logit of the run.
        spikes: how often the loss jumped up.
        step_seconds: the median time of a step; for a run that does not know it, the median of the arm's others.
        peak_memory: bytes; likewise.
    """

    loss: Floats
    initial_loss: Floats
    metric: Floats
    failed: Floats
    entropy_min: Floats
    max_logit: Floats
    spikes: Floats
    step_seconds: Floats
    peak_memory: Floats


@dataclass(frozen=True)
class Comparison:
    """Runs of the same task, data, budget and model size.

    Attributes:
        runs: all of them, by arm, learning rate and seed.
        arms: the arms, the baseline first.
        lrs: the learning rates that every measured arm ended runs at, ascending, (L,).
        seeds: the seeds that every measured arm has at all of `lrs`, ascending, (S,).
        grids: the outcomes by arm, on `seeds` × `lrs`; only of the arms that can be measured.
        metric: the name of the metric; "" where only the loss was measured.
        higher_is_better: whether more of the metric is better.
        shared: what the runs have in common, name to value.
        starts: loss and metric at init by arm, the median of its runs.
        notes: what was left out of the measures, and why.
    """

    runs: tuple[RunSummary, ...]
    arms: tuple[str, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    grids: dict[str, Grid]
    metric: str
    higher_is_better: bool
    shared: dict[str, str]
    starts: dict[str, tuple[float, float]]
    notes: tuple[str, ...]

    def loss(self, run: RunSummary) -> float:
        """The final loss of a run, but no more than that at init, which is also what a run counts that failed."""
        start = self.initial_loss(run)
        return start if run.failed or not math.isfinite(run.loss) else min(run.loss, start)

    def initial_loss(self, run: RunSummary) -> float:
        """The loss before the first step; that of the arm for a run that raised before it."""
        return run.initial_loss if math.isfinite(run.initial_loss) else self.starts[run.arm][0]

    def metric_of(self, run: RunSummary) -> float:
        """The final metric of a run, or that at init for one that diverged or raised."""
        if math.isfinite(run.metric) and run.status not in ("diverged", "error"):
            return run.metric
        return run.initial_metric if math.isfinite(run.initial_metric) else self.starts[run.arm][1]


def comparisons(collection: Collection) -> list[Comparison]:
    """Group the runs into those that can be compared, the largest group first."""
    groups: dict[tuple[tuple[str, str], ...], list[RunSummary]] = {}
    for run in collection.runs:
        groups.setdefault(run.group, []).append(run)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [_comparison(runs, collection.arms, dict(key)) for key, runs in ordered]


def of_arm(runs: Sequence[RunSummary], arm: str, lr: float | None = None) -> list[RunSummary]:
    """The runs of an arm, all or those at one learning rate."""
    return [run for run in runs if run.arm == arm and (lr is None or run.lr == lr)]


def _comparison(runs: Sequence[RunSummary], order: Sequence[str], shared: dict[str, str]) -> Comparison:
    notes: list[str] = []
    cells: dict[tuple[str, float, int], RunSummary] = {}
    for run in sorted(runs, key=lambda run: (str(run.info.get("started", "")), str(run.folder))):
        place = (run.arm, run.lr, run.seed)
        if place in cells:
            notes.append(f"{run.arm}, LR {run.lr:g}, seed {run.seed} is there more than once: the last to start counts")
        if not (place in cells and cells[place].ended and not run.ended):
            cells[place] = run
    kept = [cells[place] for place in sorted(cells, key=lambda place: (place[1], place[2]))]
    arms = _ordered({run.arm for run in kept}, order)
    kept.sort(key=lambda run: arms.index(run.arm))
    unfinished = sum(not run.ended for run in kept)
    if unfinished:
        notes.append(f"{unfinished} of {len(kept)} runs have no result yet; they are shown, not measured")

    starts = {arm: _start(of_arm(kept, arm)) for arm in arms}
    ended = {place: run for place, run in cells.items() if run.ended and math.isfinite(starts[run.arm][0])}
    measured = [arm for arm in arms if any(place[0] == arm for place in ended)]
    notes += [_why_unmeasured(of_arm(kept, arm)) for arm in arms if arm not in measured]
    lrs, seeds = _shared_grid(list(ended), measured, notes)
    metric, higher = _metric(kept)
    told = tuple(dict.fromkeys(notes))
    comparison = Comparison(tuple(kept), arms, lrs, seeds, {}, metric, higher, shared, starts, told)
    tables = {arm: [[ended[arm, lr, seed] for lr in lrs] for seed in seeds] for arm in measured if seeds}
    return replace(comparison, grids={arm: _grid(comparison, table) for arm, table in tables.items()})


def _why_unmeasured(runs: Sequence[RunSummary]) -> str:
    raised = any(run.status == "error" for run in runs)
    why = "its runs raised before they had a loss" if raised else "no run of it has ended"
    return f"{runs[0].arm} is not measured: {why}"


def _shared_grid(
    places: Sequence[tuple[str, float, int]], arms: Sequence[str], notes: list[str]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The learning rates and seeds at which every arm has an outcome."""
    have = set(places)
    all_lrs, all_seeds = {lr for _, lr, _ in places}, {seed for _, _, seed in places}
    wanted = [lr for lr in all_lrs if all(any((arm, lr, seed) in have for seed in all_seeds) for arm in arms)]
    whole = [seed for seed in all_seeds if all((arm, lr, seed) in have for arm in arms for lr in wanted)]
    left: dict[str, set[float]] = {"learning rates": all_lrs - {*wanted}, "seeds": {*map(float, all_seeds - {*whole})}}
    for what, out in left.items():
        if out and wanted:
            listed = ", ".join(f"{value:g}" for value in sorted(out))
            notes.append(f"{what} that some arm does not have are not measured: {listed}")
    if arms and not (wanted and whole):
        notes.append("no learning rate and seed is shared by all arms, so nothing is measured")
        return (), ()
    return tuple(sorted(wanted)), tuple(sorted(whole))


def _grid(comparison: Comparison, table: Sequence[Sequence[RunSummary]]) -> Grid:
    """The outcomes of one arm; `table` has its runs, (S, L)."""

    def each(of: Callable[[RunSummary], float]) -> Floats:
        return np.array([[of(run) for run in row] for row in table], dtype=np.float64)

    return Grid(
        loss=each(comparison.loss),
        initial_loss=each(comparison.initial_loss),
        metric=each(comparison.metric_of),
        failed=each(lambda run: run.failed),
        entropy_min=each(lambda run: run.entropy_min),
        max_logit=each(lambda run: run.max_logit),
        spikes=each(lambda run: run.spikes),
        step_seconds=_filled(each(lambda run: run.step_seconds)),
        peak_memory=_filled(each(lambda run: run.peak_memory)),
    )


def _filled(values: Floats) -> Floats:
    """Unknown values replaced by the median of the known ones; all NaN stay so."""
    known = values[np.isfinite(values)]
    return np.where(np.isfinite(values), values, np.median(known)) if len(known) else values


def _start(runs: Sequence[RunSummary]) -> tuple[float, float]:
    """Loss and metric at init, median over the runs that know them: they do not depend on the learning rate."""
    losses = [run.initial_loss for run in runs if math.isfinite(run.initial_loss)]
    metrics = [run.initial_metric for run in runs if math.isfinite(run.initial_metric)]
    return median(losses) if losses else math.nan, median(metrics) if metrics else math.nan


def _metric(runs: Sequence[RunSummary]) -> tuple[str, bool]:
    counted = Counter((run.metric_name, run.higher_is_better) for run in runs if run.metric_name)
    return counted.most_common(1)[0][0] if counted else ("", True)


def _ordered(arms: set[str], order: Sequence[str]) -> tuple[str, ...]:
    """The order of the compare, if there is one; else "none" first and the others by name."""
    known = [arm for arm in order if arm in arms]
    return (*known, *sorted(arms - set(known), key=lambda arm: (arm != "none", not arm.startswith("none"), arm)))
