"""The picture of sharpness_entropy.py: entropy and logits against the Hessian's eigenvalue, over runs and over time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pictures
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

MARKS = {"pre-LN": "o", "qk-norm": "s", "sigma-Reparam": "D"}
PANELS = (
    ("entropy_min", "hessian_eigenvalue", "lowest entropy, 0 to 1", "largest eigenvalue"),
    ("entropy_min", "preconditioned_eigenvalue", "lowest entropy, 0 to 1", "preconditioned by Adam"),
    ("max_logit", "hessian_eigenvalue", "largest logit", "largest eigenvalue"),
)


def draw(name: str, runs: Sequence[Any], correlations: Mapping[str, Any]) -> Path:
    """Above: every run a point, at its end. Below: the runs of the first seed over time, the end marked."""
    figure = Figure(figsize=(10.5, 6.2), dpi=150, layout="constrained")
    axes = figure.subplots(2, 3, squeeze=False, sharex="col", sharey="col")
    norm = LogNorm(min(run.lr for run in runs) / 1.5, max(run.lr for run in runs) * 3)
    ends = correlations["all arms"]["at_the_end"], correlations["all arms"]["at_the_end, given lr"]
    for column, (x, y, x_name, y_name) in enumerate(PANELS):
        above, below = axes[0][column], axes[1][column]
        for arm, mark in MARKS.items():
            found = [run for run in runs if run.arm == arm]
            points = [run.at_the_end(x) for run in found], [run.at_the_end(y) for run in found]
            drawn = above.scatter(
                *points, c=[run.lr for run in found], norm=norm, cmap="cividis", marker=mark, s=22, linewidths=0
            )
        for run in runs:
            if run.seed == min(each.seed for each in runs):
                color = drawn.cmap(norm(run.lr))
                below.plot(run.points[x], run.points[y], color=color, linewidth=0.9, alpha=0.8)
                below.plot(run.at_the_end(x), run.at_the_end(y), MARKS[run.arm], color=color, markersize=4.5)
        pair = f"{x} ~ {y}"
        above.set_title(
            f"rank correlation {ends[0][pair][0]:+.2f}, given lr {ends[1][pair][0]:+.2f}",
            fontsize=8.5,
            color=pictures.INK,
        )
        for ax in (above, below):
            pictures.dress(ax)
            ax.set_xscale("symlog", linthresh=1e-3) if x == "entropy_min" else ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_ylabel(y_name, fontsize=8, color=pictures.INK)
        below.set_xlabel(x_name, fontsize=8, color=pictures.INK)
    bar = figure.colorbar(drawn, ax=axes.ravel().tolist(), shrink=0.6, aspect=30)
    bar.set_label("learning rate", fontsize=8, color=pictures.INK)
    bar.ax.tick_params(labelsize=7, colors=pictures.INK)
    pictures.legend(
        figure, {arm: Line2D([], [], color=pictures.INK, marker=mark, linestyle="") for arm, mark in MARKS.items()}
    )
    return pictures.save(figure, name)
