import csv
import gzip
import io
import os
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import DataError
from trimtab.tasks.data import DATA_SETS
from trimtab.tasks.forecasting.series import complete, missing_of
from trimtab.tasks.forecasting.sets import BENCHMARKS, Benchmark, find_series
from trimtab.tasks.forecasting.timestamps import Frequency

real = pytest.mark.skipif(not os.environ.get("TRIMTAB_DATA"), reason="TRIMTAB_DATA is not set")
MINUTE = 60_000_000


def test_every_forecasting_set_of_the_table_is_a_benchmark() -> None:
    assert {name for name, data in DATA_SETS.items() if data.task == "forecasting"} < set(BENCHMARKS)


def test_a_path_is_read_and_columns_chosen(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("date,a,b\n2024-01-01,1,2\n2024-01-02,3,4\n")
    assert find_series(str(path)).columns == ("a", "b")
    assert find_series(str(path), ["b"]).values.tolist() == [[2, 4]]


def test_an_unknown_name_tells_of_those_there_are() -> None:
    with pytest.raises(DataError, match=r"no series 'ETTh3'\. Did you mean ETTh2\? Expected ETTh1, .* or the path"):
        find_series("ETTh3")


def test_sets_of_no_table_lie_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"electricity\.csv is missing: put the set's file there, 26,304 rows of"):
        find_series("electricity")
    monkeypatch.setitem(BENCHMARKS, "electricity", Benchmark(3, 2))
    (tmp_path / "timeseries").mkdir()
    path = tmp_path / "timeseries" / "electricity.csv.gz"
    rows = "date,0,OT\n2016-07-01 02:00:00,1,2\n2016-07-01 03:00:00,3,4\n2016-07-01 04:00:00,5,6\n"
    path.write_bytes(gzip.compress(rows.encode()))
    assert find_series("electricity").values.tolist() == [[1, 3, 5], [2, 4, 6]]
    monkeypatch.setitem(BENCHMARKS, "electricity", Benchmark(4, 2))
    with pytest.raises(DataError, match="has 3 rows of 2 values; electricity of the benchmarks has 4 of 2"):
        find_series("electricity")


@pytest.mark.data
@real
@pytest.mark.parametrize(
    ("name", "every"), [("ETTh1", 60), ("ETTm2", 15), ("weather", 10), ("national-illness", 7 * 24 * 60)]
)
def test_benchmarks_are_what_their_files_say(name: str, every: int) -> None:
    series = find_series(name)
    place = Path(os.environ["TRIMTAB_DATA"]) / DATA_SETS[name].files[0].path
    rows = list(csv.reader(io.StringIO(gzip.decompress(place.read_bytes()).decode())))
    assert series.columns == tuple(rows[0][1:])
    np.testing.assert_array_equal(series.values.T, np.array([row[1:] for row in rows[1:]], dtype=float))
    assert (series.num_steps, series.num_columns) == (BENCHMARKS[name].rows, BENCHMARKS[name].columns)
    assert series.frequency == Frequency(every * MINUTE)
    assert series.uneven == (2 if name == "weather" else 0)
    assert missing_of(series) == {}


@pytest.mark.data
@real
def test_exchange_rates_have_no_dates_and_are_daily() -> None:
    series = find_series("exchange-rate")
    assert (series.num_columns, series.num_steps) == (8, 7588)
    assert series.times is None
    assert series.frequency == Frequency(24 * 60 * MINUTE)
    assert series.values[:, 0].tolist() == [0.7855, 1.611, 0.861698, 0.634196, 0.211242, 0.006838, 0.593, 0.525486]


@pytest.mark.data
@real
def test_missing_marks_of_the_weather_count_as_values_unless_asked() -> None:
    series = find_series("weather")
    assert sum(missing_of(series, -9999).values()) == 81
    assert (complete(series).values == -9999).sum() == 81
    assert complete(series, "previous", -9999).values.min() > -9999
