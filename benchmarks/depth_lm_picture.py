"""The picture of depth_lm.py: what grows by layer, a column a depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pictures
from matplotlib import colormaps


def draw(runs: Sequence[dict[str, Any]], table: dict[str, dict[str, Any]], depths: Sequence[int], name: str) -> Path:
    """By depth and layer, at each arm's best learning rate: output variance at start and end, and gradient variance."""
    rows = ("output variance, start", "output variance, end", "gradient variance")
    figure, axes = pictures.panels(rows, [f"{depth} layers" for depth in depths], width=2.4)
    colours = {arm: colormaps["tab10"](i) for i, arm in enumerate(table[str(depths[0])])}
    marks: dict[str, object] = {}
    for column, depth in enumerate(depths):
        for arm, colour in colours.items():
            best = table[str(depth)][arm]["best_lr"]
            there = [r for r in runs if (r["depth"], r["arm"], r["lr"]) == (depth, arm, best) and not r["failed"]]
            curves = ([r["output_variance"][0] for r in there], [r["output_variance"][1] for r in there])
            panels = [line[column] for line in axes]
            for panel, lines in zip(panels, (*curves, [r["grad_variance"] for r in there]), strict=True):
                known = [values for values in lines if len(values) == depth]
                if known:
                    (marks[arm],) = panel.plot(
                        range(1, depth + 1), np.median(known, axis=0), color=colour, linewidth=1.2
                    )
                panel.set_yscale("log")
        axes[-1][column].set_xlabel("layer", fontsize=8)
    pictures.legend(figure, marks)
    return pictures.save(figure, name)
