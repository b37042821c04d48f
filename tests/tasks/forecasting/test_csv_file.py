import gzip
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import DataError
from trimtab.tasks.forecasting.csv_file import read_csv
from trimtab.tasks.forecasting.series import Series
from trimtab.tasks.forecasting.timestamps import Frequency

HOURS = """\
date,load,temp
2024-01-01 00:00:00,1.5,20
2024-01-01 01:00:00,-2e1,21
2024-01-01 02:00:00,0,22
"""


def series_of(path: Path, text: str | bytes, **options: object) -> Series:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_csv(path, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "series.csv"


def test_dates_names_and_numbers(path: Path) -> None:
    series = series_of(path, HOURS)
    assert series.columns == ("load", "temp")
    assert series.values.tolist() == [[1.5, -20.0, 0.0], [20.0, 21.0, 22.0]]
    assert series.times is not None
    assert series.times.tolist() == [datetime(2024, 1, 1, hour) for hour in range(3)]
    assert series.frequency == Frequency(3_600_000_000)
    assert (series.uneven, series.left_out, series.name) == (0, (), str(path))


@pytest.mark.parametrize(
    "text",
    [
        HOURS.replace(",", ";"),
        HOURS.replace(",", "\t"),
        HOURS.replace(",", ", "),
        HOURS.replace("\n", "\r\n"),
        HOURS.replace("\n", "\n\n"),
        HOURS.rstrip("\n"),
        "\ufeff" + HOURS,
        '"date","load","temp"\n' + HOURS.partition("\n")[2],
        gzip.compress(HOURS.encode(), mtime=0),
    ],
    ids=["semicolons", "tabs", "spaces", "CRLF", "empty lines", "no last newline", "BOM", "quotes", "gzip"],
)
def test_the_same_however_it_is_written(path: Path, text: str | bytes) -> None:
    expected = series_of(path, HOURS)
    found = series_of(path, text)
    assert found.columns == expected.columns
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.times, expected.times)


def test_without_names_and_dates(path: Path) -> None:
    series = series_of(path, "1,2\n3,4\n5,6\n")
    assert series.columns == ("column 1", "column 2")
    assert series.values.tolist() == [[1, 3, 5], [2, 4, 6]]
    assert series.times is None
    assert series.frequency is None
    dated = series_of(path, "2024-01-01,2\n2024-01-02,4\n")
    assert dated.columns == ("column 2",)
    assert dated.values.tolist() == [[2, 4]]
    assert series_of(path, "7\n8\n").values.tolist() == [[7, 8]]


def test_names_that_are_numbers_beside_a_date(path: Path) -> None:
    series = series_of(path, "date,0,1,OT\n2024-01-01,5,6,7\n2024-01-02,8,9,10\n")
    assert series.columns == ("0", "1", "OT")
    assert series.values[:, 0].tolist() == [5, 6, 7]


def test_a_date_of_digits_by_the_name_of_its_column(path: Path) -> None:
    series = series_of(path, "a,Date\n1,20240101\n2,20240102\n")
    assert series.columns == ("a",)
    assert series.frequency == Frequency(86_400_000_000)


def test_days_in_digits_under_any_name_in_front(path: Path) -> None:
    series = series_of(path, "Tag,b\n20240101,1\n20240102,2\n")
    assert series.columns == ("b",)
    assert series.frequency == Frequency(86_400_000_000)
    for numbers in ("b,Tag\n1,20240101\n2,20240102\n", "Tag,b\n20249999,1\n20240101,2\n"):
        assert series_of(path, numbers).times is None


def test_latin_1(path: Path) -> None:
    series = series_of(path, "date,°C\n2024-01-01,1\n2024-01-02,2\n".encode("latin-1"))
    assert series.columns == ("°C",)


def test_missing_values_are_nan(path: Path) -> None:
    series = series_of(path, "a,b\n1,\n,NA\nnan,null\n4,5\n")
    np.testing.assert_array_equal(series.values, [[1, np.nan, np.nan, 4], [np.nan, np.nan, np.nan, 5]])


def test_columns_without_numbers_are_left_out_and_told(path: Path) -> None:
    series = series_of(path, "date,place,a,empty\n2024-01-01,Jena,1,\n2024-01-02,Jena,2,\n")
    assert series.columns == ("a",)
    assert series.left_out == ("place", "empty")


def test_an_unnamed_count_of_rows_is_left_out(path: Path) -> None:
    series = series_of(path, ",a\n0,5\n1,6\n2,7\n")
    assert (series.columns, series.left_out) == (("a",), ("column 1",))
    assert series_of(path, ",a\n0,5\n1,6\n3,7\n").columns == ("column 1", "a")
    assert series_of(path, "0,5\n1,6\n2,7\n").columns == ("column 1", "column 2")


def test_chosen_columns_in_the_order_asked_for(path: Path) -> None:
    text = "date,a,b,c\n2024-01-01,1,2,x\n2024-01-02,3,4,5\n"
    assert series_of(path, text, columns=["b", "a"]).values.tolist() == [[2, 4], [1, 3]]
    with pytest.raises(DataError, match=r"has no column 'd'.* There are: a, b"):
        series_of(path, text, columns=["a", "b", "d"])


def test_gaps_are_counted(path: Path) -> None:
    text = "date,a\n" + "".join(f"2024-01-{day:02},1\n" for day in (1, 2, 3, 6, 7, 9))
    series = series_of(path, text)
    assert (series.frequency, series.uneven) == (Frequency(86_400_000_000), 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: expected a row of numbers"),
        ("\n\n", "is empty: expected a row of numbers"),
        ("date,a\n", "has the names of columns and no row of numbers"),
        ("date,a\n2024-01-01,x\n2024-01-02,y\n", "has no column of numbers; its columns, .* tabs, are date, a"),
        ("a,b\n1,2\n3\n", r"line 3: 1 cells, where the first row has 2"),
        ("a,b\n1,2\n3,x\n5,y\n", "line 3: 'x' in column 'b' is no number; 2 of its cells are none, 1 are. Correct"),
        ("a;b\n1;2\n3;4,5\n", r"line 3: '4,5' in column 'b' is no number; .* A decimal comma, or one betw"),
        ("a;b\n1;2,5\n3;4,5\n", r"line 2: '2,5' in column 'b' is no number; .* none, 0 are\. A decimal comma"),
        (
            'a,b\n1,"2,500.5"\n3,"4,500.5"\n',
            r"line 2: '2,500\.5' in column 'b' is no number; .* thousands\? Write 1234\.5",
        ),
        (
            HOURS.replace(",", "|"),
            "no column of numbers; its columns, between commas, semicolons or tabs, are column 1",
        ),
        (HOURS.encode("utf-16"), "is no text in UTF-8 or Latin-1: save the table as CSV, in UTF-8"),
        ("date,a\n2024-01-01,1\n2024-01-01,2\n", "line 3: 2024-01-01 00:00:00 comes again after 2024-01-01"),
        ("date,a\n2024-01-02,1\n2024-01-01,2\n", "line 3: 2024-01-01 00:00:00 comes before 2024-01-02"),
        ("date,a\n2024-01-02,1\n\n2024-01-32,2\n", "line 4: '2024-01-32' is no date like those before it"),
        ("date,a\n2024-01-02,1\n,2\n", "line 3: '' is no date"),
        ("a,b\n1,2\n3,1_000\n5,6\n", "line 3: '1_000' in column 'b' is no number"),
        ("1,5;2\n1,7;3\n2;4\n", r"line 1: '1,5' in column 'column 1' is no number; .* A decimal comma, or one between"),
        ("a,b\nm,kW\n5,6\n7,8\n", r"line 1: 'a' in column 'column 1' is no number; .* names, and one of units\? Leav"),
        ("timestamp,a\n1700000000,1\n1700003600,2\n", "'timestamp' should tell the times and begins with '1700000000'"),
        ("date,a,a\n2024-01-01,1,2\n2024-01-02,1,2\n", "more than one column named 'a'"),
        (gzip.compress(HOURS.encode(), mtime=0)[:-20], "is damaged: its gzip cannot be unpacked"),
    ],
)
def test_what_is_no_series_is_refused(path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        series_of(path, text)


def test_times_with_a_zone_are_in_utc(path: Path) -> None:
    zoned = series_of(path, "date,a\n2024-03-31T01:30+01:00,1\n2024-03-31T03:30+02:00,2\n2024-03-31T04:30+02:00,3\n")
    assert zoned.utc
    assert zoned.times is not None
    assert zoned.times[0] == np.datetime64("2024-03-31T00:30")
    assert (zoned.frequency, zoned.uneven) == (Frequency(3_600_000_000), 0)
    assert not series_of(path, HOURS).utc
    assert not series_of(path, "30.01.2024;1\n31.01.2024;2\n").utc


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_csv(path)


@given(
    st.lists(
        st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.none() | st.integers(-(10**9), 10**9)),
        min_size=2,
        max_size=30,
    )
)
def test_numbers_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, int | None]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text("x,y\n0.0,0\n" + "".join(f"{a!r},{'' if b is None else b}\n" for a, b in rows))
    found = read_csv(path).values[:, 1:]
    expected = [[a for a, _ in rows], [np.nan if b is None else b for _, b in rows]]
    np.testing.assert_array_equal(found, np.array(expected, dtype=float))
