"""What the pictures of benchmarks share: panels in one look, arms in the report's colours, files in results/."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import measure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trimtab.report.runlog import Floats

Curve = tuple[Floats, Floats]
INK, FAINT = "#3b4048", "#e4e7eb"


def panels(
    rows: Sequence[str],
    columns: Sequence[str],
    width: float = 2.0,
    height: float = 1.7,
    *,
    apart: bool = False,
    sharey: bool = True,
) -> tuple[Figure, list]:
    """A grid of small axes: what a row measures at its left, what a column shows above it; inches a panel.

    A column has one x axis; with `apart` the last row has its own. A row has one y axis, if it is shared.
    """
    figure = Figure(figsize=(width * len(columns) + 0.6, height * len(rows) + 0.7), dpi=150, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), sharex=not apart and "col", sharey=sharey and "row", squeeze=False)
    if apart:
        for above in axes[:-2].flat:
            above.tick_params(labelbottom=False)
    for row, name in zip(axes, rows, strict=True):
        row[0].set_ylabel(name, fontsize=8, color=INK)
        for ax in row:
            dress(ax)
    for ax, name in zip(axes[0], columns, strict=True):
        ax.set_title(name, fontsize=8.5, color=INK)
    return figure, axes.tolist()


def dress(ax: Axes) -> None:
    ax.tick_params(which="both", labelsize=7, colors=INK)
    ax.grid(color=FAINT, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def seeds(ax: Axes, curves: Sequence[Curve], color: str, style: str = "-", label: str | None = None) -> None:
    """Every seed thin, their median thick; a curve ends where its run diverged."""
    for steps, values in curves:
        ax.plot(steps, values, color=color, linestyle=style, linewidth=0.6, alpha=0.35)
    longest = max((steps for steps, _ in curves), key=len, default=np.empty(0))
    padded = np.full((len(curves), len(longest)), np.nan)
    for row, (_, values) in zip(padded, curves, strict=True):
        row[: len(values)] = values
    known = np.isfinite(padded).any(axis=0)
    ax.plot(longest[known], np.nanmedian(padded[:, known], axis=0), color, linestyle=style, linewidth=1.6, label=label)


def legend(figure: Figure, entries: Mapping[str, object]) -> None:
    """One legend above all panels: name to the line or mark drawn for it."""
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside upper center",
        ncols=len(entries) if figure.get_figwidth() > 2 * len(entries) else 2,
        fontsize=8,
        frameon=False,
    )


def save(figure: Figure, name: str) -> Path:
    measure.RESULTS.mkdir(parents=True, exist_ok=True)
    path = measure.RESULTS / f"{name}.png"
    figure.savefig(path)
    return path
