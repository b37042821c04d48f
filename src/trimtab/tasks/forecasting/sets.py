"""The series of the field's benchmarks by name, and any file by path."""

import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trimtab.errors import DataError
from trimtab.tasks.data import DATA_SETS, data_folder, read_data
from trimtab.tasks.forecasting.csv_file import parse_csv, read_csv
from trimtab.tasks.forecasting.series import Series, select
from trimtab.tasks.forecasting.splits import SHARES, Split
from trimtab.tasks.forecasting.timestamps import Frequency
from trimtab.words import nearest

_HOURS: Split = (8640, 2880, 2880)
_QUARTERS: Split = (34_560, 11_520, 11_520)


@dataclass(frozen=True)
class Benchmark:
    """A series that results have been published on.

    Attributes:
        rows: its steps.
        columns: how many it has.
        split: the published one.
    """

    rows: int
    columns: int
    split: Split = SHARES


BENCHMARKS: dict[str, Benchmark] = {
    "ETTh1": Benchmark(17_420, 7, _HOURS),
    "ETTh2": Benchmark(17_420, 7, _HOURS),
    "ETTm1": Benchmark(69_680, 7, _QUARTERS),
    "ETTm2": Benchmark(69_680, 7, _QUARTERS),
    "exchange-rate": Benchmark(7588, 8),
    "weather": Benchmark(52_696, 21),
    "national-illness": Benchmark(966, 7),
    "electricity": Benchmark(26_304, 321),
    "traffic": Benchmark(17_544, 862),
}
"""By name. Electricity and traffic are in no checked table of ours: their files must lie in the data folder."""


def find_series(data: str, columns: Sequence[str] | None = None) -> Series:
    """The series of a name or path.

    Rows of a benchmark count as they stand, in the order of its file, as in what has been published on it: the weather
    has one time twice and one gap, and 81 values of -9999. Two columns of our exchange rates, the last ones, are the
    other way round than in the copy that has a column OT.

    Args:
        data: one of `BENCHMARKS`, or the path of a file as `read_csv` takes it.
        columns: which to take, in this order; None for all.

    Raises:
        DataError: there is nothing of that name, or it cannot be read.
    """
    if data in DATA_SETS and data in BENCHMARKS:
        file = DATA_SETS[data].files[0]
        content = read_data(DATA_SETS[data], file.path.rpartition("/")[2])
        unpacked = content if file.packed else gzip.decompress(content)
        series = parse_csv(lambda: io.BytesIO(unpacked), data, ordered=False)
        if data == "exchange-rate":
            series = replace(series, frequency=Frequency(86_400_000_000))
    elif data in BENCHMARKS:
        series = _of_folder(data)
    elif Path(data).expanduser().is_file():
        return read_csv(Path(data).expanduser(), columns)
    else:
        known = ", ".join(BENCHMARKS)
        raise DataError(
            f"there is no series {data!r}.{nearest(data, BENCHMARKS)} Expected {known}, or the path of a CSV file"
        )
    return series if columns is None else select(series, columns)


def _of_folder(data: str) -> Series:
    places = [data_folder() / "timeseries" / f"{data}.csv{end}" for end in ("", ".gz")]
    path = next((place for place in places if place.is_file()), None)
    expected = BENCHMARKS[data]
    if path is None:
        raise DataError(
            f"{places[0]} is missing: put the set's file there, {expected.rows:,} rows of a date and "
            f"{expected.columns} values, plain or as {places[1].name}"
        )
    series = read_csv(path, ordered=False)
    if (series.num_steps, series.num_columns) != (expected.rows, expected.columns):
        raise DataError(
            f"{path} has {series.num_steps:,} rows of {series.num_columns} values; {data} of the benchmarks has "
            f"{expected.rows:,} of {expected.columns}. To train on another series, give its path"
        )
    return series
