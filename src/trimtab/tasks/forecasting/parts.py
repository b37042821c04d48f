"""A series in parts: what a model is trained, chosen and tested on, scaled by the first."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import DataError
from trimtab.tasks.forecasting.series import Numbers, Series
from trimtab.tasks.forecasting.splits import Scaler, Split, ends_of, fit_scaler
from trimtab.tasks.forecasting.windows import windows
from trimtab.tasks.notices import warn
from trimtab.tasks.task import Examples

FILE = "series.json"
"""What a trained model needs to be used: columns in order, their scale, and how far times are apart."""

_FURTHEST = 1e15  # standard deviations from the mean: squares of errors, and their means, stay float32 numbers
_STRANGE = 1e9  # times the usual size of a column's values


@dataclass(frozen=True)
class Parts:
    """Examples whose batch is what is seen, (B, C, L), and what comes then, (B, C, H), of torch's default dtype.

    Attributes:
        channels: C.
        train: to learn from.
        validation: what chooses.
        test: what is measured at the end; None if there is none.
        season: steps after which values are likely to repeat; None if that is not known.
        facts: about the series, for run.json.
        files: for the run folder.
    """

    channels: int
    train: Examples
    validation: Examples
    test: Examples | None
    season: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def parts_of(series: Series, lookback: int, horizon: int, split: Split) -> Parts:
    """Part a series as published work does.

    Each column is scaled by its mean and deviation over the training steps, windows begin at every step, and what is
    seen before the first steps of validation and test lies in the part before.

    Args:
        series: without missing values.
        lookback: steps L that the model sees.
        horizon: steps H that it forecasts.
        split: of the steps.

    Raises:
        DataError: the series is shorter than the split, a part is too short for a window, or a value is too far from
            the others to train with.
        RecipeError: it is no split.
    """
    train, validation, test = ends_of(series.num_steps, split)
    scaler = fit_scaler(series.values[:, :train])
    needed = {
        "training": (train, lookback + horizon, "look-back + horizon"),
        "validation": (validation - train, horizon, "horizon"),
        "test": (test - validation, horizon, "horizon"),
    }
    for part, (steps, least, what) in needed.items():
        if steps < least and (part != "test" or steps):
            raise DataError(
                f"the {part} part of {series.name} has {steps:,} of its {series.num_steps:,} steps, fewer than {what}, "
                f"{least:,}: take a longer series, another --split, or a smaller --model.lookback or --model.horizon"
            )
    values = scaled(series, scaler, slice(0, test))
    made = {
        "train": windows(values, lookback, train, lookback, horizon),
        "validation": windows(values, train, validation, lookback, horizon),
        "test": windows(values, validation, test, lookback, horizon) if test > validation else None,
    }
    facts = _facts(series, scaler, {"train": train, "validation": validation - train, "test": test - validation})
    facts["windows"] = {part: examples.size for part, examples in made.items() if examples is not None}
    season = None if series.frequency is None else series.frequency.season()
    files = {FILE: series_file(series, train, validation)}
    return Parts(series.num_columns, made["train"], made["validation"], made["test"], season, facts, files)  # type: ignore[arg-type]  # only of the test there may be none


def scaled(series: Series, scaler: Scaler, steps: slice) -> Tensor:
    """Values on the scale of a model, (C, steps), of torch's default dtype.

    Args:
        series: without missing values.
        scaler: of its columns.
        steps: which.

    Raises:
        DataError: a value is so far from those of the training steps that squares of errors would be infinite.
    """
    values = scaler.scale(series.values[:, steps])
    distances = np.abs(values).max(axis=1, initial=0.0)
    if (distances > _FURTHEST).any():
        place = int(distances.argmax())
        value = series.values[place, steps][np.abs(values[place]).argmax()]
        apart = f"{distances[place]:.0e} standard deviations from the mean of its training steps"
        if scaler.constant[place]:
            apart = f"where all training steps have {scaler.mean[place]:g}"
        raise DataError(
            f"{series.name} has a value of {value:g} in column {series.columns[place]!r}, {apart}: its square would "
            "be infinite. Correct it; if it stands for a missing value, say so (--missing-value, or NaN in its place)"
        )
    return torch.from_numpy(values).to(torch.get_default_dtype())


def series_file(series: Series, train: int, validation: int) -> str:
    """The content of the file `FILE`, JSON.

    Args:
        series: without missing values.
        train: the step that ends its training part, which decides the scale.
        validation: the step that ends its validation part; up to there all values decide what is trained.
    """
    scaler = fit_scaler(series.values[:, :train])
    content = {
        "columns": series.columns,
        "mean": scaler.mean.tolist(),
        "sd": scaler.sd.tolist(),
        "frequency": None if series.frequency is None else asdict(series.frequency),
        "sha256": hashlib.sha256(np.ascontiguousarray(series.values[:, :validation]).tobytes()).hexdigest(),
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def _facts(series: Series, scaler: Scaler, steps: dict[str, int]) -> dict[str, Any]:
    constant = [column for column, is_constant in zip(series.columns, scaler.constant, strict=True) if is_constant]
    strange = [column for column, values in zip(series.columns, series.values, strict=True) if _has_strange(values)]
    found = {
        "left_out": (list(series.left_out), "hold no numbers to forecast, and are left out"),
        "constant": (constant, "are constant over the training steps, and scaled by 1"),
        "strange": (
            strange,
            f"have values {_STRANGE:.0e} times as large as is usual in them, beside which the others vanish; if they "
            "stand for missing ones, say so (--missing-value, or NaN in their place)",
        ),
    }
    for columns, what in found.values():
        if columns:
            warn(f"{series.name}: columns that {what}: {', '.join(columns)}")
    if series.uneven:
        warn(f"{series.name}: steps longer or shorter than the others, which count like them: {series.uneven:,}")
    return {
        "columns": list(series.columns),
        "steps": steps,
        "frequency": None if series.frequency is None else asdict(series.frequency),
        "uneven_steps": series.uneven,
        **{name: columns for name, (columns, _) in found.items()},
    }


def _has_strange(values: Numbers) -> bool:
    """Whether the largest of a column's values is far beyond all sizes that its values have, as a mark would be."""
    sizes = np.abs(values[values != 0])
    return bool(sizes.size) and float(sizes.max()) > _STRANGE * float(np.median(sizes))
