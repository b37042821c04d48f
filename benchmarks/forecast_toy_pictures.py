"""The pictures of forecast_toy.py: errors, entropy and sharpness over time, and the attention at the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pictures
from hessian_metrics import RAW

ROWS = ("mean squared error", "attention entropy (0-1)", "sharpness (largest eigenvalue)", "attention of channels")


def draw(
    name: str, rows: Sequence[Mapping[str, Any]], maps: Mapping[str, Sequence[Sequence[float]]], best: float
) -> Path:
    """A column for each arm; every seed thin, their median thick."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure, axes = pictures.panels(ROWS, arms, width=2.1, height=1.9, apart=True)
    entries: dict[str, object] = {}
    for column, arm in enumerate(arms):
        runs = [row["curves"] for row in rows if row["arm"] == arm and "curves" in row]
        error, entropy, sharpness, attention = (line[column] for line in axes)
        for which, colour, label in (("loss", "#c9a227", "training"), ("mse", "#0b6e4f", "validation")):
            pictures.seeds(error, [curve(run, which) for run in runs], colour, label=label)
            entries[label] = error.lines[-1]
        entries["best possible"] = error.axhline(best, color="#c0392b", linewidth=1, linestyle="--")
        pictures.seeds(entropy, [curve(run, "entropy_min") for run in runs], "#1f6f8b")
        pictures.seeds(sharpness, [curve(run, RAW) for run in runs], "#7d5ba6")
        error.set_yscale("log")
        entropy.set_ylim(-0.03, 1.03)
        sharpness.set_yscale("log")
        sharpness.set_xlabel("step", fontsize=7.5)
        _map(attention, maps.get(arm))
    pictures.legend(figure, entries)
    return pictures.save(figure, name)


def curve(run: Mapping[str, Sequence[float]], which: str) -> pictures.Curve:
    """Steps and values where there are values."""
    steps, values = np.array(run["step"]), np.array(run[which], dtype=float)
    known = np.isfinite(values)
    return steps[known], values[known]


def _map(ax: Any, found: Sequence[Sequence[float]] | None) -> None:
    ax.grid(visible=False)
    if found is None:
        ax.text(0.5, 0.5, "failed", ha="center", va="center", transform=ax.transAxes, fontsize=8)
        return
    ax.imshow(
        found, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=(0.5, len(found) + 0.5, len(found) + 0.5, 0.5)
    )
