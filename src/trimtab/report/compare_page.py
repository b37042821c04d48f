"""The page of a comparison: one HTML file, from run folders alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from trimtab.errors import RunFolderError
from trimtab.report import compare_charts as charts
from trimtab.report import compare_words as words
from trimtab.report.collect import Collection, collect, nothing_readable
from trimtab.report.compare_tables import (
    differences_table,
    failures_table,
    measures_tables,
    runs_table,
    summary_text,
    unreadable_table,
)
from trimtab.report.comparison import Comparison, comparisons
from trimtab.report.looks import Look, looks
from trimtab.report.measured import Measured, measure_all
from trimtab.report.measures import TOLERANCE
from trimtab.report.page import Block, Figure, Prose, page, write_html
from trimtab.report.run_data import run_data

_MOST = 4  # groups that are drawn; of more, only the runs are listed


@dataclass(frozen=True)
class ComparePage:
    """What `write_compare_page` has done.

    Attributes:
        path: the page.
        summary: the measures as a plain table, for a terminal.
        collection: what was read.
        groups: the comparisons, largest first, with their measures.
    """

    path: Path
    summary: str
    collection: Collection
    groups: tuple[tuple[Comparison, tuple[Measured, ...]], ...]


def write_compare_page(
    paths: Sequence[str | Path], out: str | Path, tolerance: float = TOLERANCE, title: str | None = None
) -> ComparePage:
    """Read every run under some paths and write the page that compares them.

    Args:
        paths: run folders, compare folders, or folders that hold either anywhere below.
        out: the HTML file to write, replacing an older one.
        tolerance: of the LR range, see `measures.lr_range`.
        title: the heading; by default the recipe's name.

    Raises:
        RunFolderError: nothing under the paths could be read.
        OSError: the page cannot be written.
    """
    return write_collection(collect(paths), out, tolerance, title)


def write_collection(
    collection: Collection, out: str | Path, tolerance: float = TOLERANCE, title: str | None = None
) -> ComparePage:
    """The same for runs that were already read; see `write_compare_page`."""
    if not collection.runs:
        raise RunFolderError(nothing_readable(collection))
    groups = tuple((group, tuple(measure_all(group, tolerance))) for group in comparisons(collection))
    write_html(out, compare_page(collection, groups, tolerance, title))
    summary = "\n\n".join(summary_text(group, measured) for group, measured in groups)
    return ComparePage(Path(out), summary, collection, groups)


def compare_page(
    collection: Collection,
    groups: Sequence[tuple[Comparison, Sequence[Measured]]],
    tolerance: float = TOLERANCE,
    title: str | None = None,
) -> str:
    """The page as HTML; the same runs give the same text."""
    first, measured = groups[0]
    arms = list(dict.fromkeys(arm for group, _ in groups for arm in group.arms))
    dressed = looks(arms)
    blocks: list[Block] = []
    for place, (group, found) in enumerate(groups[:_MOST]):
        if len(groups) > 1:
            blocks.append(Prose(f"Comparison {place + 1} of {len(groups)}", words.headline(group, found)))
        blocks += _blocks(group, found, dressed)
    runs = [run for group, _ in groups for run in group.runs]
    blocks.append(runs_table(groups))
    tables = (failures_table(runs), unreadable_table(collection.unreadable))
    blocks += [table for table in tables if table.rows]
    blocks.append(Prose("How to read this page", words.reading(tolerance, len(first.seeds))))
    metric = next((group.metric for group, _ in groups if group.metric), "")
    return page(
        title=title or _title([group for group, _ in groups]),
        intro=[*_warnings(collection, groups), *(words.headline(first, measured) if len(groups) == 1 else [])],
        figures=blocks,
        tables=[],
        facts=_facts(groups),
        script=(files("trimtab.report") / "compare.js").read_text(encoding="utf-8"),
        data=run_data(runs, dressed, metric),
    )


def _blocks(group: Comparison, measured: Sequence[Measured], dressed: dict[str, Look]) -> list[Block]:
    shown = {arm: dressed[arm] for arm in group.arms}
    key = charts.arms_key(shown)
    loss = charts.final_loss(group)
    blocks: list[Block] = [*measures_tables(group, measured), *differences_table(group, measured)]
    outcomes = [charts.against_lr(group, loss, shown)]
    singles = loss
    if group.metric:
        singles = charts.final_metric(group)
        outcomes.append(charts.against_lr(group, singles, shown))
    told = [each for each in measured if each.differences and each.measure.name in ("best_loss", "lr_sensitivity")]
    sentence = " ".join(words.told(each) for each in told)
    if any(math.isfinite(group.loss(run)) for run in group.runs if run.ended):
        blocks.append(Figure("Against the learning rate", outcomes, sentence, key))
    small = charts.each_against_lr(group, singles, shown)
    if small:
        caption = f"The band is the lowest to the highest of the seeds; the grey line is {group.arms[0]}."
        blocks.append(Figure(f"{singles.title}, arm by arm", small, caption))
    if any(math.isfinite(run.entropy_min) for run in group.runs):
        kinds = (charts.lowest_entropy(group), charts.largest_logit(group))
        inside = [charts.against_lr(group, each, shown) for each in kinds]
        blocks.append(Figure("Inside the attention, at its worst", inside, _attention_sentence(group), key))
        maps = charts.entropy_over_steps(group)
        caption = "The lowest entropy of any head at each logged step, median of the seeds; blank where no run got to."
        blocks.append(Figure("Attention entropy over the steps", maps, caption, charts.entropy_key()))
    return blocks


def _attention_sentence(group: Comparison) -> str:
    watched = [run for run in group.runs if run.ended and math.isfinite(run.entropy_min)]
    collapsed = [run for run in watched if run.entropy_min < 0.03]
    if not collapsed:
        return "In no run that ended a head fell below 0.03 of its maximum entropy."
    failed = sum(run.failed for run in collapsed)
    return (
        f"In {words.count(len(collapsed), 'run')} of {len(watched)} a head fell below 0.03 of its maximum entropy; "
        f"{failed} of them failed. Of the others, {sum(run.failed for run in watched) - failed} failed."
    )


def _warnings(collection: Collection, groups: Sequence[tuple[Comparison, Sequence[Measured]]]) -> list[str]:
    lines = []
    if len(groups) > 1:
        drawn = "" if len(groups) <= _MOST else f" The {_MOST} largest are drawn, the others listed."
        lines.append(
            f"These runs differ in task, data, budget or model size, so they are told apart into {len(groups)} "
            f"comparisons.{drawn}"
        )
    if collection.unreadable:
        what = words.count(len(collection.unreadable), "folder")
        lines.append(f"{what} could not be read; the last table lists them.")
    for group, _ in groups[:_MOST]:
        lines += words.some_notes(group)
    versions = {str(run.info.get("trimtab")) for group, _ in groups for run in group.runs}
    if len(versions) > 1:
        lines.append(f"The runs come from different versions of Trimtab: {words.join(sorted(versions))}.")
    return lines


def _title(groups: Sequence[Comparison]) -> str:
    runs = [run for group in groups for run in group.runs]
    names = {str(name) for run in runs if (name := run.info.get("recipe_name"))}
    of = f" of {words.join(sorted(names))}" if 0 < len(names) <= 3 else ""
    apart = f" in {len(groups)} comparisons" if len(groups) > 1 else ", side by side"
    return f"{words.count(len(runs), 'run')}{of}{apart}"


def _facts(groups: Sequence[tuple[Comparison, Sequence[Measured]]]) -> dict[str, str]:
    """Machine, versions and what the runs share, as their run.json have it."""
    runs = [run for group, _ in groups for run in group.runs]
    facts = {}
    for name in ("trimtab", "torch", "python", "platform", "machine", "cpus", "threads", "strategy", "processes"):
        values = sorted({str(run.info[name]) for run in runs if run.info.get(name) is not None})
        if values:
            facts[name] = ", ".join(values)
    for place, (group, _) in enumerate(groups[:_MOST], 1):
        shared = ", ".join(f"{name} {value}" for name, value in group.shared.items() if value)
        facts["shared" if len(groups) == 1 else f"comparison {place}"] = shared or "–"
        facts["seeds" if len(groups) == 1 else f"seeds of {place}"] = ", ".join(map(str, group.seeds)) or "–"
    return facts
