"""A series of numbers in columns, and what becomes of the missing ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import DataError
from trimtab.tasks.forecasting.timestamps import Frequency, Times
from trimtab.words import nearest

Missing = Literal["refuse", "previous"]
Numbers = NDArray[np.float64]

_LARGEST = 1e150  # whose square is a number still


@dataclass(frozen=True)
class Series:
    """What was measured, step by step.

    Attributes:
        name: for errors.
        values: (C, T), NaN where one is missing.
        columns: the name of each of the C, all different.
        times: (T,), when; None if that is not told.
        frequency: the usual distance of two times; None if it is not known.
        uneven: how many neighbouring times are another distance apart.
        left_out: columns of its file that hold no numbers.
        utc: whether its times are in UTC, as those of a file are that tells a time zone.
    """

    name: str
    values: Numbers
    columns: tuple[str, ...]
    times: Times | None = None
    frequency: Frequency | None = None
    uneven: int = 0
    left_out: tuple[str, ...] = ()
    utc: bool = False

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[0] != len(self.columns):
            raise DataError(
                f"{self.name} needs values (C, T), a row for each of its {len(self.columns)} columns; "
                f"got {self.values.shape}"
            )
        if not self.values.size:
            raise DataError(f"{self.name} has {self.num_columns} columns of {self.num_steps} numbers: nothing to learn")
        twice = sorted({column for column in self.columns if self.columns.count(column) > 1})
        if twice:
            raise DataError(f"{self.name} has more than one column named {twice[0]!r}: give each its own name")
        if self.times is not None and self.times.shape != (self.num_steps,):
            raise DataError(f"{self.name} has {self.num_steps} steps and times of shape {self.times.shape}")

    @property
    def num_columns(self) -> int:
        """C."""
        return self.values.shape[0]

    @property
    def num_steps(self) -> int:
        """T."""
        return self.values.shape[1]


def select(series: Series, columns: Sequence[str]) -> Series:
    """The columns of these names, in this order.

    Raises:
        DataError: the series has no such column.
    """
    place = {column: number for number, column in enumerate(series.columns)}
    for column in columns:
        if column not in place:
            raise DataError(
                f"{series.name} has no column {column!r}.{nearest(column, place)} There are: "
                f"{', '.join(series.columns)}"
            )
    return replace(series, values=series.values[[place[column] for column in columns]], columns=tuple(columns))


def missing_of(series: Series, mark: float | None = None) -> dict[str, int]:
    """How many values are missing, by column; only of columns in which some are.

    Args:
        series: the series.
        mark: a number that stands for a missing value, such as -9999, beside NaN.
    """
    counts = _absent(series.values, mark).sum(axis=1)
    return {column: int(count) for column, count in zip(series.columns, counts, strict=True) if count}


def complete(series: Series, missing: Missing = "refuse", mark: float | None = None) -> Series:
    """The series with a finite number everywhere.

    Args:
        series: the series.
        missing: what becomes of missing values: an error ("refuse"), or the last value of the column before
            ("previous"), which no future value decides; those before the first become that one.
        mark: a number that stands for a missing value, such as -9999, beside NaN.

    Raises:
        DataError: values are missing and `missing` is "refuse"; a column has none at all; or one is infinite, or so
            large that its square would be.
    """
    counts = missing_of(series, mark)
    if counts and missing == "refuse":
        raise DataError(
            f"{series.name} lacks values: {told(counts)}. Fill them in, or take the last value before each: "
            "--missing previous"
        )
    for column, count in counts.items():
        if count == series.num_steps:
            raise DataError(f"all values of column {column!r} of {series.name} are missing: leave the column out")
    values = _filled(series.values, _absent(series.values, mark)) if counts else series.values
    for what, wrong, advice in (
        ("infinite values", np.isinf(values), "Replace them"),
        (f"values beyond {_LARGEST:g}", np.abs(values) > _LARGEST, "Give them in a larger unit"),
    ):
        found = dict(zip(series.columns, wrong.sum(axis=1).tolist(), strict=True))
        if any(found.values()):
            raise DataError(f"{series.name} has {what}: {told(found)}. {advice}")
    return replace(series, values=values)


def _absent(values: Numbers, mark: float | None) -> NDArray[np.bool_]:
    absent = np.isnan(values)
    return absent if mark is None else absent | (values == mark)


def _filled(values: Numbers, absent: NDArray[np.bool_]) -> Numbers:
    places = np.where(absent, 0, np.arange(values.shape[1]))
    last = np.maximum.accumulate(places, axis=1)  # of those that are there
    first = (~absent).argmax(axis=1)[:, None]
    return np.take_along_axis(values, np.maximum(last, first), axis=1)


def told(counts: Mapping[str, int]) -> str:
    """How many of which column, three of them by name."""
    each = [f"{count:,} of column {column!r}" for column, count in counts.items() if count]
    return ", ".join(each[:3]) + (f" and of {len(each) - 3:,} more columns" if len(each) > 3 else "")
