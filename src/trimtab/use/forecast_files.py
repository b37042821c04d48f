"""What `trimtab forecast` leaves: a table of the next steps, and a picture of them after the steps before."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trimtab.report.looks import looks
from trimtab.tasks.forecasting.series import Numbers, Series
from trimtab.tasks.forecasting.timestamps import Times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4  # that are drawn
_SEEN = 3  # steps of the series, in horizons
_INK, _FAINT = "#3b4048", "#e4e7eb"
_LETTERS = 90  # of a column's name, in the width of the picture


def write_table(path: Path, columns: Mapping[str, Numbers], times: Times | None, series: Series) -> None:
    """Write forecasts as a CSV file: when, and the columns.

    Args:
        path: of the file.
        columns: name to (H,), those of the series, and with _lower and _upper behind their bounds.
        times: when, (H,); None to count steps.
        series: what the forecasts go on from.

    Raises:
        OSError: the file cannot be written.
    """
    values = np.stack(list(columns.values()), axis=1)  # (H, columns)
    if times is None:
        first = [str(series.num_steps + step + 1) for step in range(len(values))]
    else:
        zone = "+00:00" if series.utc else ""
        first = [str(time).replace("T", " ").removesuffix(".000000") + zone for time in times]
    spread = dict(zip(series.columns, series.values.std(axis=1).tolist(), strict=True))
    digits = [
        _digits(column, spread[name if name in spread else name.rpartition("_")[0]]) for name, column in columns.items()
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step" if times is None else "date", *columns])
        for when, row in zip(first, values, strict=True):
            writer.writerow([when, *(f"{value:.{count}g}" for value, count in zip(row, digits, strict=True))])


def _digits(values: Numbers, spread: float) -> int:
    """Digits that show values to a millionth of how far apart those of their column are, or 15."""
    largest = float(np.abs(values).max())
    if not largest or not spread:
        return 15
    return min(15, max(7, 7 + math.ceil(math.log10(largest / spread))))


def draw_forecast(
    path: Path, series: Series, times: Times | None, forecast: Numbers, margin: Numbers | None, level: float | None
) -> None:
    """Draw the first four columns, one above the other: 160 mm wide, 150 dots an inch.

    Args:
        path: of the PNG file.
        series: what was, of which the last three horizons are drawn.
        times: when the forecasts are, (H,); None to count steps.
        forecast: (C, H).
        margin: half the width of the interval around it, (C, H); None for none.
        level: of the interval.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure

    shown = min(len(series.columns), _COLUMNS)
    horizon = forecast.shape[1]
    seen = min(series.num_steps, max(_SEEN * horizon, 24))
    if series.times is None or times is None:
        before = np.arange(series.num_steps - seen, series.num_steps) + 1
        after = np.arange(series.num_steps, series.num_steps + horizon) + 1
    else:
        before, after = series.times[-seen:], times
    ahead = np.concatenate([before[-1:], after])  # from the last value, so that a single step is seen too
    color = looks(["series", "forecast"])["forecast"].color
    figure = Figure(figsize=(6.3, 1.35 * shown + 0.6), dpi=150, layout="constrained")
    axes: list[Axes] = figure.subplots(shown, 1, sharex=True, squeeze=False)[:, 0].tolist()
    for place, ax in enumerate(axes):
        values = series.values[place]
        ax.plot(before, values[-seen:], color=_INK, linewidth=0.9, label="series")
        if margin is not None and level is not None:
            low, high = (np.concatenate([values[-1:], forecast[place] + half * margin[place]]) for half in (-1, 1))
            held = f"{100 * level:.4g} % interval"
            ax.fill_between(ahead, low, high, color=color, alpha=0.18, linewidth=0, label=held)
        middle = np.concatenate([values[-1:], forecast[place]])
        ax.plot(ahead, middle, color=color, linewidth=1.3, label="forecast")
        ax.set_title(_short(series.columns[place]), loc="left", fontsize=8, color=_INK, parse_math=False)
        ax.tick_params(which="both", labelsize=7, colors=_INK)
        ax.yaxis.get_offset_text().set_fontsize(7)
        ax.grid(color=_FAINT, linewidth=0.5)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.01)
    if series.times is not None and times is not None:
        locator = AutoDateLocator(minticks=3, maxticks=8)  # some unit then fits any span
        axes[-1].xaxis.set_major_locator(locator)
        axes[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes[-1].xaxis.get_offset_text().set_fontsize(7)
        if series.utc:
            axes[-1].set_xlabel("UTC", fontsize=8, color=_INK)
    else:
        axes[-1].set_xlabel("step", fontsize=8, color=_INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path)


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"
