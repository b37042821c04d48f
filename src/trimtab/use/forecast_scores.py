"""How well ways to forecast do on a test part, column by column, and what is printed of it."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trimtab.tasks.forecasting.series import Numbers
from trimtab.tasks.forecasting.splits import Scaler
from trimtab.tasks.task import Examples
from trimtab.train.screen import figures

_WINDOWS = 32  # at a time


@dataclass(frozen=True)
class Scores:
    """Errors of one way to forecast, of all windows and steps, on scaled values.

    Attributes:
        mse: mean squared error of each column, (C,).
        mae: mean absolute error of each column, (C,).
        held: share of the values that lie within the margin; None without one.
    """

    mse: Numbers
    mae: Numbers
    held: float | None = None


@torch.no_grad()
def scores_of(forecast: Callable[[Tensor], Tensor], examples: Examples, margin: Numbers | None = None) -> Scores:
    """Measure a way to forecast.

    Args:
        forecast: from what is seen, (B, C, L), to what comes then, (B, C, H).
        examples: of `trimtab.tasks.forecasting.windows.windows`.
        margin: half the width of intervals around forecasts, (C, H).
    """
    squared: Tensor | float = 0.0
    absolute: Tensor | float = 0.0
    held = values = 0
    generator = torch.Generator()
    for indices in torch.arange(examples.size).split(_WINDOWS):
        x, y = examples.batch(indices, generator)
        error = (forecast(x) - y).abs().double()
        squared = squared + error.square().sum((0, 2))
        absolute = absolute + error.sum((0, 2))
        values += error[:, 0].numel()
        if margin is not None:
            held += int((error <= torch.from_numpy(margin)).sum())
    assert isinstance(squared, Tensor)  # examples are never none
    assert isinstance(absolute, Tensor)
    share = None if margin is None else held / (values * len(squared))
    return Scores(squared.numpy() / values, absolute.numpy() / values, share)


def overall(scores: Mapping[str, Scores]) -> str:
    """The table of mean errors over all columns, a line for each way to forecast."""
    rows = [[name, figures(float(each.mse.mean())), figures(float(each.mae.mean()))] for name, each in scores.items()]
    return aligned([["", "MSE", "MAE"], *rows])


def by_column(scores: Mapping[str, Scores], columns: Sequence[str], scaler: Scaler) -> str:
    """Two tables of errors in the units of each column, MAE and MSE, a line for each column."""
    tables = []
    for title, of in (
        ("MAE, in its units", [each.mae * scaler.sd for each in scores.values()]),
        ("MSE, in their squares", [each.mse * scaler.sd**2 for each in scores.values()]),
    ):
        values = np.stack(of, axis=1)  # (C, ways)
        rows = [[name, *(f"{value:.4g}" for value in row)] for name, row in zip(columns, values, strict=True)]
        tables.append(aligned([[title, *scores], *rows]))
    return "\n\n".join(tables)


def write_scores(path: Path, scores: Mapping[str, Scores], columns: Sequence[str], scaler: Scaler) -> None:
    """Write all errors as a CSV file, a line for each way to forecast and column: in its units, and of scaled values.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["forecast", "column", "mse", "mae", "scaled_mse", "scaled_mae"])
        for name, each in scores.items():
            for place, column in enumerate(columns):
                own = (each.mse[place] * scaler.sd[place] ** 2, each.mae[place] * scaler.sd[place])
                writer.writerow([name, column, *(f"{value:.7g}" for value in (*own, each.mse[place], each.mae[place]))])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
