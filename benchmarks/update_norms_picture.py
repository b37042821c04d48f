"""The picture of update_norms.py: steps against the width with the bound drawn in, and the weights as they train."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pictures
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

LOOKS = {
    "ideal": ("#0072B2", "o", "E[g] / sqrt(E[g²]): idealised Adam"),
    "single": ("#56B4E9", "s", "g / sqrt(E[g²]): one batch"),
    "sgd": ("#7d8590", "D", "g: SGD"),
}


def draw(name: str, rows: Sequence[dict[str, Any]], sigmas: Mapping[str, Sequence[dict[str, Any]]]) -> Path:
    """Above: steps at the start, after training, and SGD's. Below: weights over the steps, and how far they moved."""
    figure = Figure(figsize=(10.5, 6.2), dpi=150, layout="constrained")
    axes = figure.subplots(2, 3)
    widths = sorted({row["width"] for row in rows})
    for ax, when in zip(axes[0], ("start", "trained"), strict=False):
        found = [row for row in rows if row["when"] == when]
        for each in ("ideal", "single"):
            _points(ax, widths, found, each)
        bounds = [median(row["bound"] for row in found if row["width"] == width) for width in widths]
        ax.plot(widths, bounds, color="#D55E00", linewidth=1.6)
        ax.plot(widths, np.sqrt(widths), color=pictures.INK, linewidth=0.8, linestyle=":")
        _dress(ax, widths, f"Adam's step, {'at the start' if when == 'start' else 'after training'}", "spectral norm")
    for when, face in (("start", None), ("trained", "white")):
        _points(axes[0][2], widths, [row for row in rows if row["when"] == when], "sgd", face)
    _dress(axes[0][2], widths, "SGD's step (white: after training)", "spectral norm over lr")
    for ax, optimizer in zip(axes[1], ("adam", "sgd"), strict=False):
        for run in sigmas[optimizer]:
            color = colormaps["cividis"](0.85 * widths.index(run["width"]) / max(1, len(widths) - 1))
            since_start = np.array(run["sigma"]) / run["sigma"][0]
            ax.plot(run["steps"], since_start, color=color, linewidth=1)
            if run["seed"] == 0:
                end = (run["steps"][-1], since_start[-1])
                ax.annotate(str(run["width"]), end, (3, -2), textcoords="offset points", fontsize=6, color=color)
        pictures.dress(ax)
        _label(ax, f"weights under {_NAMES[optimizer]}, by width", "step", "spectral norm over that at step 1")
    last = axes[1][2]
    for optimizer, color, mark in (("adam", "#0072B2", "o"), ("sgd", "#7d8590", "D")):
        moved = {width: [_moved(run) for run in sigmas[optimizer] if run["width"] == width] for width in widths}
        last.plot(widths, [median(moved[width]) for width in widths], color=color, linewidth=1.2)
        for width in widths:
            last.plot([width] * len(moved[width]), moved[width], mark, color=color, markersize=3.5, alpha=0.7)
    _dress(last, widths, "how far the weights' spectral norm moved", "change")
    lines = {label: Line2D([], [], color=color, marker=mark) for color, mark, label in LOOKS.values()}
    lines["the bound"] = Line2D([], [], color="#D55E00")
    lines["sqrt(width)"] = Line2D([], [], color=pictures.INK, linestyle=":")
    pictures.legend(figure, lines)
    return pictures.save(figure, name)


_NAMES = {"adam": "Adam", "sgd": "SGD"}


def _moved(run: Mapping[str, Any]) -> float:
    return abs(run["sigma"][-1] - run["sigma"][0])


def _points(
    ax: Axes, widths: Sequence[int], rows: Sequence[dict[str, Any]], each: str, face: str | None = None
) -> None:
    color, mark, _ = LOOKS[each]
    middle = [median(row[each] for row in rows if row["width"] == width) for width in widths]
    ax.plot(widths, middle, color=color, linewidth=1.2, zorder=1)
    of_rows = [row["width"] for row in rows], [row[each] for row in rows]
    ax.plot(*of_rows, mark, color=color, markerfacecolor=face or color, markersize=4, alpha=0.8)


def _dress(ax: Axes, widths: Sequence[int], title: str, measured: str) -> None:
    pictures.dress(ax)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(widths, [str(width) for width in widths])
    ax.xaxis.set_minor_locator(NullLocator())
    _label(ax, title, "width", measured)


def _label(ax: Axes, title: str, across: str, measured: str) -> None:
    ax.set_title(title, fontsize=8.5, color=pictures.INK)
    ax.set_xlabel(across, fontsize=8, color=pictures.INK)
    ax.set_ylabel(measured, fontsize=8, color=pictures.INK)
