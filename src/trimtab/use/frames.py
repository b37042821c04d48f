"""Frames of pandas, polars and the like to series and back, by narwhals, which imports none of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import narwhals as nw
import numpy as np

from trimtab.errors import DataError
from trimtab.tasks.forecasting.series import Numbers, Series
from trimtab.tasks.forecasting.timestamps import Frequency, Times, check_order, frequency_of, is_date

_KINDS = "a DataFrame of pandas, polars, or another library that narwhals knows"
_DAY = 86_400_000_000  # microseconds


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame that was found to be one of times and numbers.

    Attributes:
        table: its columns, without an index.
        time: when; of a type of dates. Those that tell a time zone are in UTC.
        zone: the time zone that they told.
        indexed: whether the times are the index of a pandas frame; else they are one of its columns.
        name: for errors.
    """

    table: "nw.DataFrame[Any]"
    time: "nw.Series[Any]"
    zone: str | None
    indexed: bool
    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        """All but the times, in order."""
        return tuple(name for name in self.table.columns if self.indexed or name != self.time.name)


def read_frame(frame: Any, name: str = "the frame") -> Frame:
    """Look for times and numbers in a frame.

    The times are the index if it is one of dates, and else the one column of dates.

    Args:
        frame: of pandas, polars, or another library that narwhals knows.
        name: for errors.

    Raises:
        DataError: it is none; it has no times, or several; a column holds no numbers, has no name that a file can
            hold, or the name of another.
    """
    try:
        table = nw.from_native(frame, eager_only=True)
    except TypeError:
        lazy = " A lazy frame is collected first: frame.collect()" if hasattr(frame, "collect") else ""
        raise DataError(f"{name} is a {type(frame).__name__}; expected {_KINDS}.{lazy}") from None
    except nw.exceptions.DuplicateError as error:
        raise DataError(f"{name} has more than one column of one name: {' '.join(str(error).split())}") from None
    for column in table.columns:
        if not isinstance(column, str) or column.splitlines() != [column] or column != column.strip():
            raise DataError(
                f"{name} has a column named {column!r}; expected text of one line, without spaces around it: rename it"
            )
    index = nw.maybe_get_index(table)
    times = None if index is None else _time_of(nw.from_native(index.to_series(), series_only=True))
    found = Frame(table, *(times or _time_column(table, name)), times is not None, name)
    wrong = [column for column in found.columns if not table[column].dtype.is_numeric()]
    if wrong:
        kinds = ", ".join(f"{column!r} ({table[column].dtype})" for column in wrong[:3])
        raise DataError(
            f"{name} has {len(wrong)} columns that hold no numbers: {kinds}{', ...' if wrong[3:] else ''}. Leave them "
            "out, or turn them into numbers"
        )
    return found


def series_of(frame: Frame, *, local: bool | None = None) -> tuple[Series, bool]:
    """The series in a frame, in the order of its columns; what is missing is NaN.

    Args:
        frame: as `read_frame` found it.
        local: whether times count as clocks show them in their time zone, and not as in UTC; None to find out: they do
            where they are days apart or more by the clock, as midnights are, and not more evenly so in UTC.

    Returns:
        The series, and whether its times are those of clocks.

    Raises:
        DataError: a time is missing, comes twice, or before an earlier one; or there is no row or column.
    """
    if local is None:
        local = frame.zone is not None and _counts_by_clock(frame)
    times = _times(frame, local)
    if not frame.columns or not len(times):
        raise DataError(
            f"{frame.name} has {len(times)} rows and {len(frame.columns)} columns of numbers: nothing to see"
        )
    if np.isnat(times).any():
        raise DataError(f"{frame.name} has {np.isnat(times).sum():,} rows without a time: leave them out")
    check_order(times, lambda row: f"{frame.name}, row {row}")
    frequency, places = frequency_of(times)
    values = np.stack([frame.table[column].cast(nw.Float64).to_numpy() for column in frame.columns])
    return Series(frame.name, values, frame.columns, times, frequency, places), local


def frame_like(frame: Frame, times: Times, columns: Mapping[str, Numbers], *, local: bool) -> Any:
    """A frame of the same library, with other times and columns, the times where and of the type that they were.

    Times of clocks that a time zone skips come as much later as it skips; those that it has twice are the first ones.

    Args:
        frame: the frame it shall be like.
        times: (T,), in UTC, or as clocks show them.
        columns: name to (T,), those of `frame` and others; the first come in its order, and then the others.
        local: which of the two the times are.

    Raises:
        DataError: a time does not exist, or twice, in a time zone that Python does not know.
    """
    library = frame.table.implementation
    kind = frame.time.dtype
    if local and frame.zone is not None:
        times, local = _in_utc(times, frame.zone)
    when = nw.new_series(frame.time.name, times.astype("datetime64[us]"), backend=library)
    when = when.cast(nw.Datetime(kind.time_unit) if isinstance(kind, nw.Datetime) else kind)
    if frame.zone is not None:
        try:
            dated = when.dt.replace_time_zone(frame.zone if local else "UTC")
        except Exception as error:  # each library has its own
            raise DataError(
                f"a time from {times[0]} to {times[-1]} is skipped or comes twice in {frame.zone}, where clocks "
                "change: give times in UTC"
            ) from error
        when = dated if local else dated.dt.convert_time_zone(frame.zone)
    made = nw.from_dict({name: columns[name] for name in (*frame.columns, *columns)}, backend=library)
    if frame.indexed:
        return nw.to_native(nw.maybe_set_index(made, index=when))
    names = [*frame.table.columns, *(name for name in columns if name not in frame.columns)]
    return nw.to_native(made.with_columns(when).select(names))  # in from_dict, a time zone would be lost


def in_order(series: Series, columns: tuple[str, ...]) -> Series:
    """The same columns in another order.

    Raises:
        DataError: a column is missing, or there is another one.
    """
    missing = [column for column in columns if column not in series.columns]
    strange = [column for column in series.columns if column not in columns]
    if missing or strange:
        told = [f"lacks {', '.join(map(repr, missing[:5]))}" + (" ..." if missing[5:] else "")] if missing else []
        told += (
            [f"has {', '.join(map(repr, strange[:5]))}" + (" ..." if strange[5:] else "") + " besides"]
            if strange
            else []
        )
        raise DataError(
            f"{series.name} {' and '.join(told)}; expected the {len(columns)} columns of the fit, in any order, and no "
            "others: what is known beforehand (exogenous columns) cannot be used"
        )
    places = [series.columns.index(column) for column in columns]
    return replace(series, values=series.values[places], columns=columns)


def _time_of(column: "nw.Series[Any]") -> "tuple[nw.Series[Any], str | None] | None":
    """A column of times, and the time zone that they tell, in which case they are in UTC; None of another column."""
    kind = column.dtype
    if isinstance(kind, nw.Datetime) and kind.time_zone is not None:
        return column.dt.convert_time_zone("UTC"), kind.time_zone
    if isinstance(kind, nw.Datetime | nw.Date):
        return column, None
    native = nw.to_native(column)
    # narwhals cannot read all names of pandas' time zones: not America/New_York
    zone = getattr(getattr(native, "dtype", None), "tz", None)
    if zone is None:
        return None
    return nw.from_native(native.dt.tz_convert("UTC"), series_only=True), str(zone)


def _time_column(table: "nw.DataFrame[Any]", name: str) -> "tuple[nw.Series[Any], str | None]":
    found = [times for column in table.columns if (times := _time_of(table[column]))]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{name} has {len(found)} columns of times, {', '.join(t.name for t, _ in found)}: leave one")
    for column in table.columns:
        first = (table[column].drop_nulls().head(1).to_list() or [None])[0]
        if isinstance(first, date) or (isinstance(first, str) and is_date(first.strip())):
            what = "text" if isinstance(first, str) else "objects"
            raise DataError(
                f"{name} has dates as {what} in column {column!r}: turn them into times, by pandas.to_datetime(...) or "
                "polars' .str.to_datetime()"
            )
    raise DataError(
        f"{name} has no times: expected a column of dates, or a DatetimeIndex, which pandas makes of periods by "
        ".to_timestamp()"
    )


def _counts_by_clock(frame: Frame) -> bool:
    """Whether times that tell a zone are even days, or longer, as clocks show them, and not rather in UTC."""
    shown, utc = _times(frame, local=True), _times(frame, local=False)
    (frequency, uneven), (_, uneven_in_utc) = frequency_of(shown), frequency_of(utc)
    if not _is_of_days(frequency) or uneven != uneven_in_utc:
        return _is_of_days(frequency) and uneven < uneven_in_utc
    return _are_midnights(shown) or not _are_midnights(utc)


def _are_midnights(times: Times) -> bool:
    return bool((times == times.astype("datetime64[D]")).all())


def _in_utc(times: Times, zone: str) -> tuple[Times, bool]:
    """Times of clocks in UTC, and whether they are those of clocks still: in a zone that Python does not know."""
    try:
        place = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError):
        return times, True
    # Python takes a time that clocks skip for one by the clock before, and of two the first one.
    moments = [time.replace(tzinfo=place).astimezone(UTC).replace(tzinfo=None) for time in times.tolist()]
    return np.array(moments, dtype="datetime64[us]"), False


def _is_of_days(frequency: Frequency | None) -> bool:
    return frequency is not None and (frequency.unit != "microsecond" or frequency.count % _DAY == 0)


def _times(frame: Frame, local: bool) -> Times:
    time = frame.time
    if frame.zone is not None:
        time = (time.dt.convert_time_zone(frame.zone) if local else time).dt.replace_time_zone(None)
    times: Times = time.cast(nw.Datetime("us")).to_numpy().astype("datetime64[us]")
    if isinstance(time.dtype, nw.Datetime) and time.dtype.time_unit == "ns":
        finer = np.flatnonzero((time.to_numpy().astype("datetime64[ns]") != times) & ~np.isnat(times))
        if len(finer):
            raise DataError(
                f"{frame.name}, row {finer[0]}: {time.to_list()[int(finer[0])]} is not a whole number of microseconds, "
                "the finest that times can be here: round them, or let them count larger units"
            )
    return times
