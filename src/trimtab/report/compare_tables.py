"""The tables of a comparison, for the page and for the terminal."""

import math
from collections.abc import Sequence

from trimtab.report.collect import Unreadable
from trimtab.report.compare_words import at_lr, count, number, some_notes, told
from trimtab.report.comparison import Comparison
from trimtab.report.differences import MIN_SEEDS, Difference
from trimtab.report.measured import Measured
from trimtab.report.page import Table
from trimtab.report.run_data import ending
from trimtab.report.summary import RunSummary

# A terminal is narrow: the page has the others.
_IN_TERMINAL = ("best_metric", "best_loss", "lr_sensitivity", "share_failed", "step_time_ratio")


def measures_tables(comparison: Comparison, measured: Sequence[Measured]) -> list[Table]:
    """A row for each arm, a column for each measure: what arms compete for, then what was seen inside and its cost."""
    if not measured:
        return []
    shown = [each for each in measured if any(math.isfinite(value) for value in each.values.values())]
    lrs, seeds = count(len(comparison.lrs), "learning rate"), count(len(comparison.seeds), "seed")
    ends = f" from {comparison.lrs[0]:g} to {comparison.lrs[-1]:g}" if len(comparison.lrs) > 1 else ""
    if len(comparison.seeds) > 1:
        seeds += "; in brackets the 95 % interval over the seeds"
    first = f"Over {lrs}{ends} and {seeds}."
    if len(comparison.grids) > 1 and len(comparison.seeds) >= MIN_SEEDS:
        first += " Bold: the seeds tell this arm from every other. Grey: the seeds tell it to be worse than the best."
    second = f"Time and memory are over those of {next(iter(comparison.grids))}."
    tables = [
        ("Measures", [each for each in shown if each.measure.better], first),
        ("Inside, and what it costs", [each for each in shown if not each.measure.better], second),
    ]
    return [_measures_table(comparison, title, columns, text) for title, columns, text in tables if columns]


def _measures_table(comparison: Comparison, title: str, shown: Sequence[Measured], sentence: str) -> Table:
    arms = list(comparison.grids)
    bold = {(arms.index(each.winner), place) for place, each in enumerate(shown, 1) if each.winner}
    soft = {(arms.index(arm), place) for place, each in enumerate(shown, 1) for arm in each.behind}
    return Table(
        title,
        ["arm", *(each.measure.title for each in shown)],
        [[arm, *(_cell(comparison, each, arm) for each in shown)] for arm in arms],
        sentence,
        frozenset(bold),
        frozenset(soft),
        hints=["", *(each.measure.meaning for each in shown)],
    )


def differences_table(comparison: Comparison, measured: Sequence[Measured]) -> list[Table]:
    """What the seeds can tell, pair by pair; empty with one arm, or too few seeds to tell anything."""
    contested = [each for each in measured if each.differences]
    if not contested or len(comparison.seeds) < MIN_SEEDS:
        return []
    pairs = [(each.first, each.second) for each in contested[0].differences]
    rows = [
        [f"{first} − {second}", *(_difference(each, each.differences[place]) for each in contested)]
        for place, (first, second) in enumerate(pairs)
    ]
    soft = {
        (place, column)
        for column, each in enumerate(contested, 1)
        for place in range(len(pairs))
        if not each.differences[place].told
    }
    sentence = " ".join(told(each) for each in contested)
    return [
        Table(
            f"What {count(len(comparison.seeds), 'seed')} can tell",
            ["difference", *(each.measure.title for each in contested)],
            rows,
            f"In brackets the 95 % interval; p after Holm's correction for {count(len(pairs), 'pair')}. Grey: the "
            f"seeds cannot tell. {sentence}",
            soft=frozenset(soft),
            folded=True,
        )
    ]


def runs_table(groups: Sequence[tuple[Comparison, Sequence[Measured]]]) -> Table:
    """Every run; a row opens its curves."""
    metric = next((group.metric for group, _ in groups if group.metric), "")
    header = ["arm", "LR", "seed", "end", "final loss", *([metric] if metric else [])]
    header += ["lowest entropy", "largest logit", "spikes", "alarms", "s a step"]
    runs = [run for group, _ in groups for run in group.runs]
    return Table(
        "Every run",
        header,
        [_run_row(run, bool(metric)) for run in runs],
        "Click on a row for the run's curves and alarms.",
        keys=[str(run.folder) for run in runs],
    )


def failures_table(runs: Sequence[RunSummary]) -> Table:
    """The runs that failed or have no result, and those with damaged parts."""
    rows = [
        [run.arm, number(run.lr, "g"), str(run.seed), "; ".join([ending(run), *run.notes]), str(run.folder)]
        for run in runs
        if run.failed or not run.ended or run.notes
    ]
    return Table("Runs that failed, are not finished, or are damaged", ["arm", "LR", "seed", "what", "folder"], rows)


def unreadable_table(unreadable: Sequence[Unreadable]) -> Table:
    """What could not be read, and why."""
    return Table("Not readable", ["folder", "why"], [[str(each.path), each.reason] for each in unreadable])


def summary_text(comparison: Comparison, measured: Sequence[Measured]) -> str:
    """The measures as plain text, one line an arm; * marks an arm that the seeds tell from every other."""
    if not measured:
        return "\n".join([f"{count(len(comparison.runs), 'run')}; nothing can be measured.", *some_notes(comparison)])
    by_name = {each.measure.name: each for each in measured}
    shown = [by_name[name] for name in _IN_TERMINAL if name in by_name]
    shown = [each for each in shown if any(math.isfinite(value) for value in each.values.values())]
    rows = [["", *(each.measure.title for each in shown)]]
    for arm in comparison.grids:
        cells = [
            number(each.values[arm], each.measure.form)
            + at_lr(comparison, arm, each)
            + ("*" if each.winner == arm else "")
            for each in shown
        ]
        rows.append([arm, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(_right(row, widths))]).rstrip() for row in rows]
    note = "* the seeds tell it from every other arm" if any(each.winner for each in shown) else ""
    seeds = count(len(comparison.seeds), "seed")
    what = note or f"{seeds} cannot name a winner in any column" if len(rows) > 2 else "there is one arm"
    lines.append(f"({count(len(comparison.lrs), 'learning rate')}, {seeds}; {what})")
    return "\n".join([*lines, *some_notes(comparison)])


def _right(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]


def _cell(comparison: Comparison, each: Measured, arm: str) -> str:
    low, high = each.intervals[arm]
    form = each.measure.form
    spread = f"\n[{number(low, form)}, {number(high, form)}]" if math.isfinite(low) else ""
    return f"{number(each.values[arm], form)}{at_lr(comparison, arm, each)}{spread}"


def _difference(each: Measured, difference: Difference) -> str:
    if not math.isfinite(difference.value):
        return "–"
    form = each.measure.form
    spread = f"\n[{difference.low:{form}}, {difference.high:{form}}]" if math.isfinite(difference.low) else ""
    chance = "" if math.isnan(difference.p) else f"\np {difference.p:.2g}" if difference.p >= 0.001 else "\np < 0.001"
    return f"{difference.value:+{form}}{spread}{chance}"


def _run_row(run: RunSummary, metric: bool) -> list[str]:
    return [
        run.arm,
        number(run.lr, "g"),
        str(run.seed),
        f"{run.status} at {run.steps}",
        number(run.loss, ".4g"),
        *([number(run.metric, ".4f")] if metric else []),
        number(run.entropy_min, ".4f"),
        number(run.max_logit, ",.4g"),
        str(run.spikes),
        str(len(run.alarms)),
        number(run.step_seconds, ".3g"),
    ]
