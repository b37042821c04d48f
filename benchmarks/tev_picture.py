"""The picture of tev.py: TEV against the variances of gradients, a point a run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pictures
from matplotlib import colormaps
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

MARKS = "osD^v"


def draw(runs: Sequence[dict[str, Any]], name: str) -> Path:
    """A row for mu and sigma, a column for each variance; colours are learning rates, marks are depths."""
    across, down = ("entries, blocks", "entries, shallow", "entries, embedding", "batches"), ("mu", "sigma")
    figure, axes = pictures.panels([f"TEV, {tev}" for tev in down], across, width=2.4, height=2.0)
    lrs, depths = (sorted({run[key] for run in runs}) for key in ("lr", "depth"))
    colours = {lr: colormaps["viridis"](place / max(1, len(lrs) - 1)) for place, lr in enumerate(lrs)}
    marks = dict(zip(depths, MARKS, strict=False))
    for row, tev in zip(axes, down, strict=True):
        for ax, variance in zip(row, across, strict=True):
            for run in runs:
                if not (math.isfinite(run[tev]) and math.isfinite(run[variance]) and run[variance] > 0):
                    continue
                look = {"color": colours[run["lr"]], "marker": marks[run["depth"]]}
                ax.scatter(run[variance], run[tev], s=14, alpha=0.8, linewidths=0, **look)
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter(NullFormatter())
    for ax in axes[-1]:
        ax.set_xlabel("variance of gradients", fontsize=8, color=pictures.INK)
    dots = {f"lr {lr:g}": Line2D([], [], color=colour, marker="o", linestyle="") for lr, colour in colours.items()}
    shapes = {f"{n} layers": Line2D([], [], color=pictures.INK, marker=m, linestyle="") for n, m in marks.items()}
    pictures.legend(figure, dots | shapes)
    return pictures.save(figure, name)
