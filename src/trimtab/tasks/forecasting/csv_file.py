"""Series from a file of comma-separated values, which also may be packed by gzip."""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np

from trimtab.errors import DataError
from trimtab.tasks.forecasting.series import Numbers, Series, select
from trimtab.tasks.forecasting.timestamps import check_order, frequency_of, is_date, parse_dates, tells_zone

_DELIMITERS = ("\t", ";", ",")  # the first that fits: a comma may also be a decimal one
_DATE_NAMES = {"date", "datetime", "time", "timestamp", "ds"}
_MISSING = {"", "na", "n/a", "nan", "null", "none", "-", "?"}
_ROWS = 4096  # that are held as text at a time


@dataclass(eq=False)
class _Column:
    """What has been read of a column.

    Attributes:
        name: of the column.
        parts: its values, NaN where a cell is no number.
        numbers: how many cells are one.
        others: how many are none, and not marked as missing either.
        example: the line and the text of the first of these.
    """

    name: str
    parts: list[Numbers] = field(default_factory=list)
    numbers: int = 0
    others: int = 0
    example: tuple[int, str] = (0, "")


def read_csv(path: Path, columns: Sequence[str] | None = None, *, ordered: bool = True) -> Series:
    """The series in a file, a row for each step.

    Cells are separated by commas, semicolons or tabs. The first row names the columns if one of its cells is no number
    and no date where the second row has one; without such a row they are "column 1", "column 2" ... The first column
    of dates tells the times; the very first one may have days in eight digits, 20241231. Columns without any number,
    and the unnamed one in front that counts rows, are left out, which `Series.left_out` tells. Empty cells and "NA",
    "NaN", "null" and the like are missing values.

    Args:
        path: of the file, in UTF-8 or Latin-1.
        columns: which to take, in this order; None for all.
        ordered: whether times must rise; otherwise rows count as they stand.

    Raises:
        DataError: it cannot be read; it has no rows, no numbers, or rows of different lengths; a cell among numbers is
            none; dates cannot be read, or do not rise.
    """

    def opened() -> IO[bytes]:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return gzip.open(path) if packed else path.open("rb")  # type: ignore[return-value]  # one in all but name

    return parse_csv(opened, str(path), columns, ordered=ordered)


def parse_csv(
    opened: Callable[[], IO[bytes]], name: str, columns: Sequence[str] | None = None, *, ordered: bool = True
) -> Series:
    """The same from whatever opens as a file.

    Args:
        opened: opens it, unpacked.
        name: for errors.
        columns: which to take, in this order; None for all.
        ordered: as `read_csv` takes it.

    Raises:
        DataError: as `read_csv`.
    """
    try:
        for encoding in ("utf-8-sig", "latin-1"):
            try:
                with opened() as raw, io.TextIOWrapper(raw, encoding, newline="") as text:
                    return _series(text, name, columns, ordered)
            except UnicodeDecodeError:
                continue
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is damaged: its gzip cannot be unpacked ({error})") from None
    except csv.Error as error:
        raise DataError(f"{name} is no file of comma-separated values ({error})") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror or error})") from None
    raise AssertionError("every file is Latin-1")


def _series(text: Iterator[str], name: str, columns: Sequence[str] | None, ordered: bool) -> Series:
    head = list(islice((line for line in text if line.strip()), 2))
    if any("\0" in line for line in head):
        raise DataError(f"{name} is no text in UTF-8 or Latin-1: save the table as CSV, in UTF-8")
    reader = csv.reader(chain(head, text), delimiter=_delimiter(head), skipinitialspace=True)
    rows = ((reader.line_num, row) for row in reader if row)
    first, second = next(rows, None), next(rows, None)
    if first is None:
        raise DataError(f"{name} is empty: expected a row of numbers for each step, with or without names above")
    cells = [cell.strip() for cell in first[1]]
    named = _are_names(cells, second and second[1])
    names = [cell if named and cell else f"column {place}" for place, cell in enumerate(cells, 1)]
    begin = [row for row in (None if named else first, second) if row is not None]
    if not begin:
        raise DataError(f"{name} has the names of columns and no row of numbers")
    dated = _date_column(names, [row for _, row in begin], name)
    read = [_Column(column) for column in names]
    dates, lines = _read(chain(begin, rows), read, dated, name)

    def where(row: int) -> str:
        return f"{name}, line {lines[row]}"

    times = None if dated is None else parse_dates(dates, where)
    if times is not None and ordered:
        check_order(times, where)
    frequency, uneven = (None, 0) if times is None else frequency_of(times)
    others = [column for place, column in enumerate(read) if place != dated]
    counting = others[:1] if named and not cells[0] and _counts_rows(others[0]) else []
    kept = [column for column in others if column not in counting and _is_kept(column, columns, name)]
    if not kept:
        raise DataError(
            f"{name} has no column of numbers; its columns, between commas, semicolons or tabs, are {', '.join(names)}"
        )
    left_out = () if columns is not None else tuple(column.name for column in others if column not in kept)
    values = np.stack([np.concatenate(column.parts) for column in kept])
    utc = times is not None and tells_zone(dates[0])
    series = Series(name, values, tuple(column.name for column in kept), times, frequency, uneven, left_out, utc)
    return series if columns is None else select(series, columns)


def _read(
    rows: Iterator[tuple[int, list[str]]], columns: list[_Column], dated: int | None, name: str
) -> tuple[list[str], list[int]]:
    """Put all rows into columns; returns the dates, if there are any, and the line of each row."""
    dates: list[str] = []
    lines: list[int] = []
    while some := list(islice(rows, _ROWS)):
        for line, row in some:
            if len(row) != len(columns):
                raise DataError(f"{name}, line {line}: {len(row)} cells, where the first row has {len(columns)}")
        numbers = [line for line, _ in some]
        for place, (column, cells) in enumerate(zip(columns, zip(*(row for _, row in some), strict=True), strict=True)):
            if place == dated:
                dates += [cell.strip() for cell in cells]
            else:
                _add(column, cells, numbers)
        lines += numbers
    return dates, lines


def _add(column: _Column, cells: Sequence[str], lines: Sequence[int]) -> None:
    try:
        if any("_" in cell for cell in cells):  # 1_000 is a number of Python's alone
            raise ValueError
        values = np.fromiter(map(float, cells), np.float64, len(cells))
    except ValueError:
        found = [_number(cell) for cell in cells]
        values = np.array([np.nan if number is None else number for number in found])
        others = [place for place, number in enumerate(found) if number is None]
        if others and not column.others:
            column.example = lines[others[0]], cells[others[0]]
        column.others += len(others)
    column.numbers += int((~np.isnan(values)).sum())
    column.parts.append(values)


def _is_kept(column: _Column, wanted: Sequence[str] | None, name: str) -> bool:
    """Whether a column is one of numbers; an error if it is neither that nor one of something else."""
    line, cell = column.example
    comma = "," in cell and any(_number(cell.replace(",", other)) is not None for other in (".", ""))
    if (wanted is not None and column.name not in wanted) or not (column.numbers or comma):
        return False
    if column.others:
        hint = " A decimal comma, or one between thousands? Write 1234.5." if comma else ""
        hint = " A row of names, and one of units? Leave one of them." if line == 1 and not comma else hint
        raise DataError(
            f"{name}, line {line}: {cell!r} in column {column.name!r} is no number; {column.others:,} of its cells are "
            f"none, {column.numbers:,} are.{hint} Correct the file, or choose other columns: --columns"
        )
    return True


def _counts_rows(column: _Column) -> bool:
    values = np.concatenate(column.parts)
    return bool((np.diff(values) == 1).all() and values[0] in (0, 1))


def _delimiter(lines: Sequence[str]) -> str:
    for delimiter in _DELIMITERS:
        counts = {len(row) for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True)}
        if len(counts) == 1 and counts.pop() > 1:
            return delimiter
    return ","


def _are_names(first: Sequence[str], second: Sequence[str] | None) -> bool:
    """Whether the first row names the columns: where it has text, the second has a number or a date."""
    text = [not _is_value(cell) and cell.lower() not in _MISSING for cell in first]
    if second is None:
        return all(text)
    return any(is_text and _is_value(cell) for is_text, cell in zip(text, second, strict=False))


def _is_value(cell: str) -> bool:
    number = _number(cell)
    return is_date(cell.strip()) if number is None else not np.isnan(number)


def _number(cell: str) -> float | None:
    """The number of a cell, NaN for a missing one; None if it is neither."""
    try:
        return float(cell.replace("_", "x"))  # 1_000 is a number of Python's alone
    except ValueError:
        return np.nan if cell.strip().lower() in _MISSING else None


def _is_day_in_digits(cell: str) -> bool:
    """Whether a cell is a day as 20241231."""
    digits = cell.strip()
    return len(digits) == 8 and digits[:2] in ("19", "20") and digits.isdecimal() and is_date(digits)


def _date_column(names: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> int | None:
    for place, (column, cell) in enumerate(zip(names, rows[0], strict=False)):
        if _number(cell) is None and is_date(cell.strip()):
            return place
        if place == 0 and all(_is_day_in_digits(row[0]) for row in rows if row):
            return place
        if column.lower() in _DATE_NAMES:
            if is_date(cell.strip()):  # 20241231, also a number
                return place
            raise DataError(
                f"{name}: column {column!r} should tell the times and begins with {cell!r}: write dates like "
                "2024-12-31 23:59:00, or rename it to have it as a column of numbers"
            )
    return None
