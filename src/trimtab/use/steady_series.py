"""What a series must be so that a forecaster can learn from it and go on with it."""

import logging
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import numpy as np

from trimtab.errors import DataError
from trimtab.tasks.forecasting.series import Missing, Series, complete, missing_of
from trimtab.tasks.forecasting.timestamps import Frequency, Times, frequency_of

_UNEVEN = 0.1  # of the steps: with more, there is no frequency to go on with
_FEW, _MANY = 2, 10  # uneven steps that holidays explain; steps that tell of a frequency

_log = logging.getLogger("trimtab")


def completed(series: Series, missing: Missing) -> Series:
    """The series with a finite number everywhere.

    Raises:
        DataError: values are missing and shall not be ("refuse"), or a column has none; or one is infinite.
    """
    counts = missing_of(series)
    if counts and missing == "refuse":
        named = ", ".join(f"{count:,} of column {column!r}" for column, count in list(counts.items())[:3])
        raise DataError(
            f"{series.name} lacks values: {named}{', ...' if len(counts) > 3 else ''}. Fill them in, or take the last "
            'value before each: missing="previous"'
        )
    return complete(series, missing)


def last(series: Series, steps: int) -> Series:
    """The last steps of a series, or all that it has."""
    times = None if series.times is None else series.times[-steps:]
    return replace(series, values=series.values[:, -steps:], times=times)


def joined(series: Series, more: Series) -> Series:
    """A series and what follows it, of the same columns in the same order.

    Raises:
        DataError: the second does not follow.
    """
    assert series.times is not None
    assert more.times is not None
    if more.times[0] <= series.times[-1]:
        raise DataError(
            f"{more.name} begins at {_shown(more.times[0])}, and {series.name} ends at {_shown(series.times[-1])}: "
            "expected one that follows"
        )
    times = np.concatenate([series.times, more.times])
    frequency, uneven = frequency_of(times)
    values = np.concatenate([series.values, more.values], axis=1)
    return replace(series, values=values, times=times, frequency=frequency, uneven=uneven)


def check_frequency(series: Series) -> Frequency:
    """The frequency of a series that has times.

    Raises:
        DataError: it is one of a single time, or more than a tenth of the steps are longer or shorter than usual.
    """
    if series.frequency is None:
        raise DataError(f"{series.name} has a single time, and so no frequency: take a longer series")
    _check_share(series.name, series.uneven, series.num_steps - 1, series.frequency)
    return series.frequency


def check_goes_on(series: Series, frequency: Frequency, before: Times) -> None:
    """Refuse a series of another frequency; some steps that are longer or shorter are told by a warning.

    Args:
        series: the look-back.
        frequency: that of the fit.
        before: all times that are known, the series' among them: a short look-back may have a holiday or a gap.

    Raises:
        DataError: more than a tenth of the series' steps are longer or shorter; but two may be, if no more than a
            tenth are of all that are known.
    """
    assert series.times is not None
    uneven, steps = _uneven(series.times, frequency), series.num_steps - 1
    if uneven > _UNEVEN * steps:
        known = len(before) - 1
        here = uneven > _FEW or (uneven == steps and known < _MANY)
        if here or _uneven(before, frequency) > max(1, _UNEVEN * known):
            _check_share(series.name, uneven, steps, frequency)
    if uneven:
        _log.warning(
            "%s: steps longer or shorter than %s, which count like it: %d", series.name, in_words(frequency), uneven
        )


def in_words(frequency: Frequency) -> str:
    """A frequency as "0:15:00", "7 days", "1 month" or "3 month ends"."""
    if frequency.unit == "microsecond":
        return str(timedelta(microseconds=frequency.count)).removesuffix(", 0:00:00")
    return f"{frequency.count} {frequency.unit}{'s' if frequency.count > 1 else ''}"


def _check_share(name: str, uneven: int, steps: int, frequency: Frequency) -> None:
    if uneven > _UNEVEN * steps:
        raise DataError(
            f"the times of {name} are not evenly apart: {uneven:,} of {steps:,} steps are longer or shorter than "
            f"{in_words(frequency)}. Give it a row for each step (resample), and fill in the values; even are equal "
            "spans, the same day of each month, its last day, and days from Monday to Friday"
        )


def _uneven(times: Times, frequency: Frequency) -> int:
    return sum(int(frequency.after(one, 1)[0] != next_one) for one, next_one in pairwise(times))


def _shown(time: np.datetime64) -> str:
    return str(time).replace("T", " ").removesuffix(".000000")
