"""Alarms, calibrated: how often they come before a run fails, how often they cry wolf, and how early they are.

    python benchmarks/alarms.py                   # 102 runs, half an hour on one core; killed, it goes on where it was
    python benchmarks/alarms.py --no-train        # fits and reports on the runs that are there

Three tasks (small_tasks.py), several ways to train each at several learning rates (alarm_runs.py), watched about a
hundred times a run. What failure is, is decided from the loss alone (and was written down before any threshold was
fitted, but for the margin over the healthy runs: see docs/alarms.md):

  best      the lowest final loss of any run of the task, chance the loss without looking at the input;
            final is the median of the last tenth of the logged losses, smooth the running median of five
  healthy   the final loss has come at least three quarters of the way from chance to best
  failed    it has come less than half of the way, or left the finite numbers
  impaired  between the two: reported, but neither a failure to be predicted nor a run on which an alarm is false
  when      a failed run fails at the earliest of: its first loss that is not finite; the first logged step from which
            on smooth stays a quarter of the way from best to chance above every healthy run's of the task (from there
            on the loss alone tells); the first from which on smooth stays as far above its own lowest so far

An alarm predicts a failure when it is raised at an earlier logged step. Recall is the share of failed runs that a
predictive alarm (those of PREDICTIVE: about heads and weights) predicts; it is also given without the runs that fail
within their first twentieth, where there is hardly anything to read yet. A false alarm is a healthy run that raises
one, at any step. Thresholds are fitted on the healthy runs alone: of a grid, the most
sensitive choice that leaves one step of the grid to the last one that alarms a healthy run. They are fitted on two
tasks and reported on the third, and then, for `trimtab.watch.alarms.Thresholds`, on all three.

Prints the tables of docs/alarms.md (with --docs it puts them there) and writes results/alarms.json.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import alarm_runs
import alarm_tables
import measure
import torch
from alarm_controls import controls
from alarm_failure import Case, judge
from alarm_runs import Planned
from alarm_score import plain, score
from small_tasks import TASKS

from trimtab.report.runlog import Run, read_run
from trimtab.watch.alarms import KINDS, Alarms, Head, Reading, Thresholds

PREDICTIVE = ("entropy collapse", "logit growth", "sigma growth", "large updates", "dead head")
FROM_LOSS = ("loss spike", "divergence")
# What is fitted: which kind it decides, and the choices from the most sensitive to the strictest.
GRID: dict[str, tuple[str, tuple[Any, ...]]] = {
    "collapse_entropy": ("entropy collapse", (0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.015, 0.01)),
    "max_logit": ("logit growth", (100.0, 150.0, 200.0, 300.0, 500.0, 700.0, 1e3, 1.5e3, 2e3, 3e3, 5e3, 7e3, 1e4)),
    "sigma_growth": ("sigma growth", (1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.5, 3.0, 3.5, 4.0, 5.0)),
    "update_ratio": (
        "large updates",
        (0.056, 0.063, 0.07, 0.08, 0.09, 0.1, 0.112, 0.125, 0.14, 0.16, 0.18, 0.2, 0.224),
    ),
    "dead_lines": ("dead head", (10, 15, 20, 30, 40)),
}


def first_alarms(log: Run, thresholds: Thresholds, thinned: int = 1) -> dict[str, int]:
    """The step at which each kind of alarm is first raised when every `thinned`-th line of a log is read."""
    heads = [Head(module, int(number)) for module, _, number in (name.rpartition(" head ") for name in log.heads)]
    alarms = Alarms(thresholds)
    first: dict[str, int] = {}
    for i, line in enumerate(log.lines):
        if i and (i + 1) % thinned:
            continue
        numbers = zip(
            log.entropy[i].tolist(), log.entropy_normalized[i].tolist(), log.max_logit[i].tolist(), strict=True
        )
        readings = {head: Reading(*values) for head, values in zip(heads, numbers, strict=True)}
        for alarm in alarms.check(line["step"], line, readings):
            first.setdefault(alarm.kind, alarm.step)
    return first


def fit(
    cases: Sequence[Case], first: Mapping[str, Mapping[Any, Sequence[int | None]]], tasks: Sequence[str]
) -> dict[str, Any]:
    """For each threshold the most sensitive choice that leaves a step of its grid to the last false alarm."""
    healthy = [i for i, case in enumerate(cases) if case.outcome == "healthy" and case.plan.setup.task in tasks]
    fitted = {}
    for name, alarms in first.items():
        choices = list(alarms)
        wolf = [i for i, choice in enumerate(choices) if any(alarms[choice][run] is not None for run in healthy)]
        fitted[name] = choices[min(wolf[-1] + 2, len(choices) - 1) if wolf else 0]
    return fitted


def first_by_choice(cases: Sequence[Case]) -> dict[str, dict[Any, list[int | None]]]:
    """For each threshold and each of its choices, the first alarm of every run that comes from it."""
    found: dict[str, dict[Any, list[int | None]]] = {name: {} for name in GRID}
    # No kind depends on another's thresholds, so that one pass tries a choice of each.
    for together in zip_longest(*(choices for _, choices in GRID.values())):
        settings = {name: choice for name, choice in zip(GRID, together, strict=True) if choice is not None}
        alarms = [first_alarms(case.log, replace(Thresholds(), **settings)) for case in cases]
        for name, choice in settings.items():
            found[name][choice] = [each.get(GRID[name][0]) for each in alarms]
    return found


def load(folder: Path, seeds: int, train: bool) -> list[Case]:
    """Train the runs that are missing, then judge all of them."""
    logs: dict[str, dict[Planned, Run]] = {task: {} for task in TASKS}
    for plan in alarm_runs.planned(seeds):
        if train:
            alarm_runs.collect(plan, folder)
        if (folder / str(plan)).exists():
            logs[plan.setup.task][plan] = read_run(folder / str(plan))
    return [case for task, found in logs.items() if found for case in judge(task, found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/alarms"), help="where the runs are kept")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--no-train", action="store_true", help="report on the runs that are there")
    parser.add_argument("--docs", type=Path, help="a page whose tables are to be replaced: docs/alarms.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    results = calibrate(load(arguments.folder, arguments.seeds, not arguments.no_train))
    print(alarm_tables.tables(results))
    if arguments.docs is not None:
        alarm_tables.write_into(arguments.docs, results)
    print("written:", measure.write("alarms", results))


def calibrate(cases: Sequence[Case]) -> dict[str, Any]:
    """Fit, score, and put everything into plain values."""
    tasks = list(dict.fromkeys(case.plan.setup.task for case in cases))
    first = first_by_choice(cases)
    splits = {}
    for held_out in tasks:
        fitted = fit(cases, first, [task for task in tasks if task != held_out])
        test = [case for case in cases if case.plan.setup.task == held_out]
        alarms = [first_alarms(case.log, replace(Thresholds(), **fitted)) for case in test]
        splits[held_out] = {"fitted": fitted, "scores": _scores(test, alarms)}
    fitted = fit(cases, first, tasks)
    thresholds = replace(Thresholds(), **fitted)
    alarms = [first_alarms(case.log, thresholds) for case in cases]
    thinned = {str(lines): [first_alarms(case.log, thresholds, lines) for case in cases] for lines in (1, 2, 5, 10)}
    confidence = {kind: _confidence(cases, [each.get(kind) for each in alarms]) for kind in KINDS}
    return {
        "thresholds": asdict(thresholds),
        "fitted": fitted,
        "confidence": {kind: value for kind, value in confidence.items() if value is not None},
        "splits": splits,
        "all": _scores(cases, alarms),
        "groups": _groups(cases, alarms),
        "thinned": {lines: plain(score(cases, _union(found, PREDICTIVE))) for lines, found in thinned.items()},
        "controls": controls(cases),
        "controls with neither": controls([case for case in cases if _is_bare(case)]),
        "runs": [_row(case, found) for case, found in zip(cases, alarms, strict=True)],
    }


Firsts = Sequence[Mapping[str, int]]


def _union(alarms: Firsts, kinds: Iterable[str]) -> list[int | None]:
    kinds = tuple(kinds)
    return [min((each[kind] for kind in kinds if kind in each), default=None) for each in alarms]


def _scores(cases: Sequence[Case], alarms: Firsts) -> dict[str, Any]:
    groups = {"predictive": PREDICTIVE, "from the loss": FROM_LOSS} | {kind: (kind,) for kind in KINDS}
    return {name: plain(score(cases, _union(alarms, kinds))) for name, kinds in groups.items()}


def _groups(cases: Sequence[Case], alarms: Firsts) -> dict[str, Any]:
    """The predictive alarms by what holds the model together, and by seed."""
    bare = [_is_bare(case) for case in cases]
    groups = {"with LayerNorm or sigma-Reparam": [not each for each in bare], "with neither": bare}
    for seed in sorted({case.plan.setup.seed for case in cases}):
        groups[f"of seed {seed}"] = [case.plan.setup.seed == seed for case in cases]
    found = {}
    for name, members in groups.items():
        chosen = [i for i, member in enumerate(members) if member]
        found[name] = plain(score([cases[i] for i in chosen], _union([alarms[i] for i in chosen], PREDICTIVE)))
    return found


def _is_bare(case: Case) -> bool:
    return case.plan.setup.norm == "none" and case.plan.setup.stabilizer == "none"


def _confidence(cases: Sequence[Case], alarms: Sequence[int | None]) -> float | None:
    """How often a run that raised the alarm did not end healthy: (n + 1) / (raised + 2); None if none raised it."""
    raised = [case.outcome for case, alarm in zip(cases, alarms, strict=True) if alarm is not None]
    return round((sum(o != "healthy" for o in raised) + 1) / (len(raised) + 2), 2) if raised else None


def _row(case: Case, first: Mapping[str, int]) -> dict[str, Any]:
    # A loss of 1e11 lies 1e11 ways behind chance; how far exactly says nothing.
    end = {"outcome": case.outcome, "way": round(max(case.way, -100.0), 3)}
    return {"run": str(case.plan), "steps": case.steps, **end, "failed_at": case.failed_at, "alarms": dict(first)}


if __name__ == "__main__":
    main()
