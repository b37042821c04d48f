"""What `trimtab forecast` leaves: a table of the next steps, and a picture of them after the steps before."""

import csv
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


def write_table(path: Path, columns: Mapping[str, Numbers], times: Times | None, num_steps: int) -> None:
    """Write forecasts as a CSV file: when, and the columns.

    Args:
        path: of the file.
        columns: name to (H,).
        times: when, (H,); None to count steps.
        num_steps: how many steps the series has.

    Raises:
        OSError: the file cannot be written.
    """
    values = np.stack(list(columns.values()), axis=1)  # (H, columns)
    if times is None:
        first = [str(num_steps + step + 1) for step in range(len(values))]
    else:
        first = [str(time).replace("T", " ").removesuffix(".000000") for time in times]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step" if times is None else "date", *columns])
        writer.writerows([when, *(f"{value:.7g}" for value in row)] for when, row in zip(first, values, strict=True))


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
    color = looks(["series", "forecast"])["forecast"].color
    figure = Figure(figsize=(6.3, 1.35 * shown + 0.6), dpi=150, layout="constrained")
    axes: list[Axes] = figure.subplots(shown, 1, sharex=True, squeeze=False)[:, 0].tolist()
    for place, ax in enumerate(axes):
        values = series.values[place]
        ax.plot(before, values[-seen:], color=_INK, linewidth=0.9, label="series")
        if margin is not None and level is not None:
            low, high = forecast[place] - margin[place], forecast[place] + margin[place]
            held = f"{100 * level:.4g} % interval"
            ax.fill_between(after, low, high, color=color, alpha=0.18, linewidth=0, label=held)
        ax.plot(
            np.concatenate([before[-1:], after]),
            np.concatenate([values[-1:], forecast[place]]),
            color=color,
            linewidth=1.3,
            label="forecast",
        )
        ax.set_title(series.columns[place], loc="left", fontsize=8, color=_INK)
        ax.tick_params(which="both", labelsize=7, colors=_INK)
        ax.grid(color=_FAINT, linewidth=0.5)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.01)
    if series.times is not None and times is not None:
        locator = AutoDateLocator(minticks=3, maxticks=8)  # some unit then fits any span
        axes[-1].xaxis.set_major_locator(locator)
        axes[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes[-1].xaxis.get_offset_text().set_fontsize(7)
    else:
        axes[-1].set_xlabel("step", fontsize=8, color=_INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path)
