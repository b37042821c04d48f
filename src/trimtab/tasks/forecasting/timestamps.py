"""When the values of a series were taken: reading dates, their order, and how far apart they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import DataError

Unit = Literal["microsecond", "month", "month end", "business day"]
Times = NDArray[np.datetime64]
"""(T,), in microseconds, without a time zone."""

_DAY = 86_400_000_000  # microseconds
_DATES = ("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y")
_FORMATS = [f"{date}{time}" for date in _DATES for time in ("", " %H:%M", " %H:%M:%S")] + ["%Y-%m", "%Y/%m"]


@dataclass(frozen=True)
class Frequency:
    """How far apart two neighbouring times are.

    Attributes:
        count: so many units.
        unit: "microsecond"; "month", the same day of the month each time, or the last of one that is shorter; "month
            end", its last day; or "business day", from Monday to Friday.
        day: of "month", if not all have it: 29 or 30; None for that of the last time.
    """

    count: int
    unit: Unit = "microsecond"
    day: int | None = None

    def season(self) -> int | None:
        """Steps after which values are likely to repeat: a day, of days a week, of weeks or months a year.

        That is 24 for hours, 96 for quarters of an hour, 7 for days, 5 for business days, 52 for weeks, 12 for months;
        None where no such span is a whole number of steps.
        """
        if self.unit == "business day":
            return 5 if self.count == 1 else None
        if self.unit != "microsecond":
            return 12 // self.count if self.count < 12 and 12 % self.count == 0 else None
        if self.count == 7 * _DAY:
            return 52
        span = _DAY if self.count < _DAY else 7 * _DAY
        return span // self.count if self.count < span and span % self.count == 0 else None

    def after(self, last: np.datetime64, steps: int) -> Times:
        """The next times after one, (steps,)."""
        last = last.astype("datetime64[us]")
        ahead = np.arange(1, steps + 1) * self.count
        if self.unit == "microsecond":
            return last + ahead.astype("timedelta64[us]")
        if self.unit == "business day":
            day = last.astype("datetime64[D]")
            days = np.busday_offset(day, ahead, roll="backward")
            return days.astype("datetime64[us]") + (last - day.astype("datetime64[us]"))
        month = last.astype("datetime64[M]")
        rest = last - month.astype("datetime64[us]")  # since the month began
        if self.unit == "month end":
            rest = rest % np.timedelta64(_DAY, "us")
            ends = (month + ahead + 1).astype("datetime64[D]") - 1
            return ends.astype("datetime64[us]") + rest
        begin, end = (month + ahead).astype("datetime64[us]"), (month + ahead + 1).astype("datetime64[us]")
        hours = rest % np.timedelta64(_DAY, "us")
        if self.day is not None:
            rest = np.timedelta64((self.day - 1) * _DAY, "us") + hours
        return np.minimum(begin + rest, end - np.timedelta64(_DAY, "us") + hours)


def parse_dates(cells: Sequence[str], where: Callable[[int], str]) -> Times:
    """Read dates that are all written in one way.

    Args:
        cells: ISO 8601, or numbers in the order year, month, day (or the other way round, or month, day, year) between
            dashes, dots or slashes, with or without hours, minutes and seconds. Those that tell a time zone become UTC.
        where: the place of a cell, for errors.

    Raises:
        DataError: a cell is no date, or days and months cannot be told apart.
    """
    try:
        return _iso(cells, where)
    except ValueError:
        pass
    found: dict[bytes, Times] = {}
    furthest = 0
    for form in _FORMATS:
        times, read = _in_format(cells, form)
        furthest = max(furthest, read)
        if times is not None:
            found[times.tobytes()] = times
    rising = [times for times in found.values() if (np.diff(times) > np.timedelta64(0, "us")).all()]
    if len(rising) == 1 or len(found) == 1:
        return (rising or list(found.values()))[0]
    if found:
        raise DataError(
            f"the dates from {where(0)} on can be read with the day or the month first: write them as year-month-day"
        )
    raise DataError(
        f"{where(furthest)}: {cells[furthest]!r} is no date like those before it: write 2024-12-31 23:59:00"
    )


def is_date(cell: str) -> bool:
    """Whether a cell can be read as a date."""
    try:
        datetime.fromisoformat(cell)
    except ValueError:
        return any(_in_format([cell], form)[1] for form in _FORMATS)
    return True


def tells_zone(cell: str) -> bool:
    """Whether a date tells how far it is from UTC, as 2024-12-31T23:59:00+01:00 does."""
    try:
        return datetime.fromisoformat(cell).tzinfo is not None
    except ValueError:
        return False


def check_order(times: Times, where: Callable[[int], str]) -> None:
    """Refuse times that do not rise.

    Raises:
        DataError: a time comes twice or before an earlier one; the first such place is told, and how many there are.
    """
    steps = np.diff(times)
    for wrong, what in ((steps < np.timedelta64(0, "us"), "before"), (steps == np.timedelta64(0, "us"), "again after")):
        places = np.flatnonzero(wrong)
        if len(places):
            first = int(places[0])
            shown = [str(time).replace("T", " ").removesuffix(".000000") for time in times[first : first + 2]]
            raise DataError(
                f"{where(first + 1)}: {shown[1]} comes {what} {shown[0]} ({len(places):,} such places): sort the rows "
                "by time, and leave one for each time; where clocks were put back, give times in UTC"
            )


def frequency_of(times: Times) -> tuple[Frequency | None, int]:
    """The usual distance of neighbouring times, and how many places have another; None of fewer than two times.

    Days from Monday to Friday are business days where two weekends or more lie between them.
    """
    steps = np.diff(times)
    if not (steps > np.timedelta64(0, "us")).any():
        return None, 0
    months = times.astype("datetime64[M]")
    rest = times - months.astype("datetime64[us]")
    apart = np.diff(months).astype(int)
    if len(times) > 2 and (apart > 0).all():
        ends = (times.astype("datetime64[D]") + 1).astype("datetime64[M]") > months
        hours = rest % np.timedelta64(_DAY, "us")
        if (rest == rest[0]).all():
            return _usual(apart, "month", _late(_day_of(times)[0]))
        if ends.all() and (hours == hours[0]).all():
            return _usual(apart, "month end")
        day = _day_of(times).max()
        if ((_day_of(times) == day) | (ends & (_day_of(times) < day))).all() and (hours == hours[0]).all():
            return _usual(apart, "month", _late(day))
    days = times.astype("datetime64[D]")
    if (
        np.is_busday(days).all()
        and (times - days == times[0] - days[0]).all()
        and days[-1] - days[0] > np.timedelta64(10, "D")
    ):
        found, uneven = _usual(np.busday_count(days[:-1], days[1:]), "business day")
        if found.count == 1:  # and not the same day of every week
            return found, uneven
    return _usual(steps.astype(np.int64), "microsecond")


def _day_of(times: Times) -> NDArray[np.int64]:
    """Of the month, from 1."""
    days = times.astype("datetime64[D]") - times.astype("datetime64[M]").astype("datetime64[D]")
    return days.astype(np.int64) + 1


def _late(day: np.int64) -> int | None:
    """A day of the month that not all months have; None for others."""
    return int(day) if day > 28 else None


def _usual(steps: NDArray[Any], unit: Unit, day: int | None = None) -> tuple[Frequency, int]:
    values, counts = np.unique(steps[steps > 0], return_counts=True)
    usual = int(values[counts.argmax()])
    return Frequency(usual, unit, day), int((steps != usual).sum())


def _iso(cells: Sequence[str], where: Callable[[int], str]) -> Times:
    times = [datetime.fromisoformat(cell) for cell in cells]
    aware = [time.tzinfo is not None for time in times]
    if any(aware):
        if not all(aware):
            raise DataError(f"{where(aware.index(False))}: a date without a time zone, where others have one")
        times = [time.astimezone(UTC).replace(tzinfo=None) for time in times]
    return np.array(times, dtype="datetime64[us]")


def _in_format(cells: Sequence[str], form: str) -> tuple[Times | None, int]:
    """The times, or None; and how many of the cells could be read."""
    times = []
    for cell in cells:
        try:
            times.append(datetime.strptime(cell, form))
        except ValueError:
            return None, len(times)
    return np.array(times, dtype="datetime64[us]"), len(times)
