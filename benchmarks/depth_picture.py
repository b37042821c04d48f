"""The picture of depth.py: losses over the learning rate, gradients and entropies by layer, a column a depth."""

import math
import statistics
from typing import Any

import pictures
from matplotlib.figure import Figure

from trimtab.report.looks import looks


def draw(results: dict[str, Any], name: str) -> None:
    """Loss over learning rate, and at the best one gradients and entropies by layer; a column for each depth."""
    runs, unigram = results["runs"], results["unigram_loss"]
    groups = list(dict.fromkeys((run["optimizer"], run["depth"]) for run in runs))
    titles = [f"{optimizer}, {depth} + {depth} blocks" for optimizer, depth in groups]
    rows = ["loss, nats a token", "gradient at step 1", "lowest entropy at the end"]
    figure = Figure(figsize=(2.4 * len(titles) + 0.6, 5.8), dpi=150, layout="constrained")
    axes = figure.subplots(len(rows), len(titles), sharey="row", squeeze=False)  # what is below differs by row
    for across, title in zip(axes, rows, strict=True):
        across[0].set_ylabel(title, fontsize=8, color=pictures.INK)
    for top, title in zip(axes[0], titles, strict=True):
        top.set_title(title, fontsize=8.5, color=pictures.INK)
    for ax in axes.flat:
        pictures.dress(ax)
    names = list(dict.fromkeys(run["arm"] for run in runs))
    colors = {arm: look.color for arm, look in looks(names).items()}
    entries: dict[str, object] = {}
    for column, group in enumerate(groups):
        ours = [run for run in runs if (run["optimizer"], run["depth"]) == group]
        lrs = sorted({run["lr"] for run in ours})
        axes[0][column].axhline(unigram, color=pictures.INK, linestyle=":", linewidth=0.8)
        for arm in names:
            cells = [[run["loss"] for run in ours if (run["arm"], run["lr"]) == (arm, lr)] for lr in lrs]
            medians = [min(statistics.median(cell), unigram + 4) for cell in cells]  # what broke lies at the top
            style = {"color": colors[arm], "linewidth": 1.2}
            (entries[arm],) = axes[0][column].plot(lrs, medians, marker="o", markersize=3, **style)
            best = next(
                e["best_lr"] for e in results["table"] if (e["optimizer"], e["depth"], e["arm"]) == (*group, arm)
            )
            run = next(run for run in ours if (run["arm"], run["lr"]) == (arm, best))
            stacked(axes[1][column], run["gradient_by_layer"]["first"], run["depth"], style)
            stacked(axes[2][column], run["entropy_by_layer"], run["depth"], style)
        axes[0][column].set_xscale("log")
        axes[0][column].set_xlim(0.8 * min(run["lr"] for run in runs), 1.25 * max(run["lr"] for run in runs))
        if len(lrs) == 1:  # between two tens, whose ticks would be many
            axes[0][column].set_xticks(lrs, [f"{lrs[0]:g}"])
            axes[0][column].minorticks_off()
        axes[0][column].set_xlabel("learning rate", fontsize=7)
        axes[1][column].set_yscale("log")
        for below in axes[1:, column]:
            below.set_xlabel("block: encoder, then decoder", fontsize=7)
    pictures.legend(figure, entries)
    pictures.save(figure, name)


def stacked(ax: Any, values: dict[str, float], depth: int, style: dict[str, Any]) -> None:
    """Values of blocks, the encoder's first, then the decoder's; the lowest of what a block has."""
    found = [
        min((value for name, value in values.items() if f"{name}.".startswith(f"{side}.{block}.")), default=math.nan)
        for side in ("encoder", "decoder")
        for block in range(depth)
    ]
    ax.plot(range(1, 2 * depth + 1), found, **style)
    ax.axvline(depth + 0.5, color=pictures.FAINT, linewidth=0.8)
