"""The numbers of a comparison in files for other tools: CSV, parquet, and a picture for a paper."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import RunFolderError
from trimtab.report.comparison import Comparison, of_arm
from trimtab.report.looks import looks
from trimtab.report.measured import Measured
from trimtab.report.summary import RunSummary

Value = str | int | float
Groups = Sequence[tuple[Comparison, Sequence[Measured]]]

RUN_COLUMNS: dict[str, tuple[str, Callable[[RunSummary], Value]]] = {
    "folder": ("the run folder", lambda run: str(run.folder)),
    "recipe": ("the recipe's name, or its class", lambda run: _recipe_name(run)),
    "arm": ("the side of the comparison", lambda run: run.arm),
    "lr": ("the recipe's learning rate", lambda run: run.lr),
    "seed": ("the recipe's seed", lambda run: run.seed),
    "status": ("how it ended; error: it raised; unfinished: there is no result yet", lambda run: run.status),
    "failed": ("1 if it diverged, raised, or ended with a loss no lower than at init", lambda run: int(run.failed)),
    "error": ("what it raised", lambda run: run.error),
    "steps": ("optimiser steps taken", lambda run: run.steps),
    "loss": ("final evaluation loss, or that of the last batch where none was measured", lambda run: run.loss),
    "initial_loss": ("the same before the first step", lambda run: run.initial_loss),
    "metric_name": ("which metric decides; empty: the loss", lambda run: run.metric_name),
    "metric": ("the final metric", lambda run: run.metric),
    "initial_metric": ("the metric before the first step", lambda run: run.initial_metric),
    "entropy_min": ("lowest attention entropy of any head at any logged step, 0 to 1", lambda run: run.entropy_min),
    "max_logit": ("largest attention logit of any head at any logged step", lambda run: run.max_logit),
    "spikes": ("how often the logged loss jumped up", lambda run: run.spikes),
    "alarms": ("alarms raised", lambda run: len(run.alarms)),
    "step_seconds": ("median time of a step, s", lambda run: run.step_seconds),
    "peak_memory_bytes": ("largest resident memory, bytes", lambda run: run.peak_memory),
}
"""The columns of the table of runs: what each means, and how it is found."""


def write_csv(path: str | Path, groups: Groups) -> list[Path]:
    """Write three CSV files: the runs, and beside them the measures and the differences between arms.

    What is not known is an empty cell.

    Args:
        path: of the table of runs; the others are called after it, e.g. runs-measures.csv, runs-differences.csv.
        groups: the comparisons with their measures.

    Returns:
        The files.

    Raises:
        OSError: one cannot be written.
    """
    path = Path(path)
    runs = [[column(run) for _, column in RUN_COLUMNS.values()] for group, _ in groups for run in group.runs]
    measures: list[list[Value]] = []
    differences: list[list[Value]] = []
    for place, (_, measured) in enumerate(groups, 1):
        for each in measured:
            measures += [
                [
                    place,
                    arm,
                    each.measure.name,
                    value,
                    *each.intervals[arm],
                    int(each.winner == arm),
                    each.measure.meaning,
                ]
                for arm, value in each.values.items()
            ]
            differences += [
                [place, each.measure.name, d.first, d.second, d.value, d.low, d.high, d.p, int(d.told)]
                for d in each.differences
            ]
    tables = {
        path: (list(RUN_COLUMNS), runs),
        path.with_stem(f"{path.stem}-measures"): (
            ["comparison", "arm", "measure", "value", "low", "high", "winner", "meaning"],
            measures,
        ),
        path.with_stem(f"{path.stem}-differences"): (
            ["comparison", "measure", "first", "second", "difference", "low", "high", "p_holm", "told"],
            differences,
        ),
    }
    for place_of, (header, rows) in tables.items():
        with place_of.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([_cell(value) for value in row] for row in rows)
    return list(tables)


def write_parquet(path: str | Path, groups: Groups) -> None:
    """Write the table of runs as parquet; each column carries its meaning as metadata.

    Raises:
        RunFolderError: pyarrow is not installed.
        OSError: the file cannot be written.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise RunFolderError("a parquet file needs pyarrow: pip install pyarrow; --csv needs nothing") from None
    runs = [run for group, _ in groups for run in group.runs]
    columns = {name: [column(run) for run in runs] for name, (_, column) in RUN_COLUMNS.items()}
    table = pyarrow.table(columns)
    fields = [field.with_metadata({"meaning": RUN_COLUMNS[field.name][0]}) for field in table.schema]
    pyarrow.parquet.write_table(table.cast(pyarrow.schema(fields)), path)


def write_png(path: str | Path, comparison: Comparison) -> None:
    """Draw loss and metric against the learning rate, for one column of a paper: 84 mm wide, 300 dots an inch.

    A line is the median of the seeds, a band their lowest to highest, as on the page and in its colours.

    Raises:
        RunFolderError: no run of the comparison has ended.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    ended = [run for run in comparison.runs if run.ended and run.lr > 0]
    if not ended:
        raise RunFolderError("there is nothing to draw: no run has ended")
    panels: list[tuple[str, Callable[[RunSummary], float]]] = [("final loss", comparison.loss)]
    if comparison.metric:
        panels.append((comparison.metric, comparison.metric_of))
    rates = sorted({run.lr for run in ended})
    dressed = looks(comparison.arms)
    rows = -(-len(comparison.arms) // 2)  # of the legend
    figure = Figure(figsize=(3.3, 1.75 * len(panels) + 0.16 * rows + 0.2), dpi=300, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (title, of) in zip(axes, panels, strict=True):
        shown: list[float] = []
        for arm in comparison.arms:
            values = {lr: _known([of(run) for run in of_arm(ended, arm, lr)]) for lr in rates}
            xs = [lr for lr in rates if values[lr]]
            shown += [value for lr in xs for value in values[lr]]
            look = dressed[arm]
            ax.fill_between(
                xs,
                [min(values[lr]) for lr in xs],
                [max(values[lr]) for lr in xs],
                color=look.color,
                alpha=0.15,
                linewidth=0,
            )
            ax.plot(
                xs,
                [float(np.median(values[lr])) for lr in xs],
                color=look.color,
                linestyle=_LINES[look.dash],
                marker=_MARKS[look.symbol],
                markersize=3,
                linewidth=1.2,
                label=arm,
            )
        ax.set_xscale("log")
        if title == "final loss" and shown and min(shown) > 0 and max(shown) > 20 * min(shown):
            ax.set_yscale("log")
        ax.set_ylabel(title, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(axis="y", color="#e4e7eb", linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xticks(rates, [f"{lr:g}" for lr in rates])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(NullFormatter())
    axes[-1].set_xlabel("learning rate", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=6.5, frameon=False, columnspacing=1)
    figure.savefig(path)


_LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_MARKS = {"circle": "o", "diamond": "D", "square": "s", "triangle-up": "^", "triangle-down": "v", "star": "*"}


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _recipe_name(run: RunSummary) -> str:
    return str(run.info.get("recipe_name") or run.info.get("task") or "")


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value
