import numpy as np
import pytest

from trimtab.errors import DataError
from trimtab.tasks.forecasting.series import Series, complete, missing_of, select

NAN = np.nan


def series(*rows: list[float]) -> Series:
    return Series("tides", np.array(rows), tuple("abcdef"[: len(rows)]))


def test_missing_values_are_refused_with_their_numbers() -> None:
    made = series([1, NAN, NAN], [1, 2, 3], [NAN, 1, 1])
    assert missing_of(made) == {"a": 2, "c": 1}
    with pytest.raises(
        DataError, match=r"tides lacks values: 2 of column 'a', 1 of column 'c'\. Fill them in, or take"
    ):
        complete(made)
    assert missing_of(made, mark=1) == {"a": 3, "b": 1, "c": 3}


def test_a_missing_value_becomes_the_last_one_before() -> None:
    made = series([NAN, NAN, 5, NAN, 7, NAN], [1, -9999, 3, -9999, -9999, 6])
    filled = complete(made, "previous", mark=-9999)
    assert filled.values.tolist() == [[5, 5, 5, 5, 7, 7], [1, 1, 3, 3, 3, 6]]
    unmarked = complete(made, "previous")
    assert unmarked.values[1].tolist() == made.values[1].tolist()


def test_nothing_missing_changes_nothing() -> None:
    made = series([1, 2], [3, -9999])
    assert complete(made).values is made.values
    assert missing_of(made) == {}


def test_no_future_value_decides_what_is_filled_in() -> None:
    random = np.random.default_rng(0)
    values = np.where(random.random((3, 50)) < 0.4, NAN, random.standard_normal((3, 50)))
    values[:, 0] = 0
    whole = complete(series(*values), "previous").values
    for end in (10, 25):
        np.testing.assert_array_equal(complete(series(*values[:, :end]), "previous").values, whole[:, :end])


def test_a_column_without_values_and_infinite_ones_are_refused() -> None:
    with pytest.raises(DataError, match="all values of column 'b' of tides are missing"):
        complete(series([1, 2], [NAN, NAN]), "previous")
    with pytest.raises(DataError, match="infinite values: 1 of column 'a', 2 of column 'b'"):
        complete(series([1, np.inf], [-np.inf, np.inf], [0, 0]))


def test_columns_are_chosen_by_name() -> None:
    made = select(series([1, 2], [3, 4], [5, 6]), ["c", "a"])
    assert (made.columns, made.values.tolist()) == (("c", "a"), [[5, 6], [1, 2]])
    with pytest.raises(DataError, match="tides has no column 'd'"):
        select(made, ["d"])


def test_what_is_no_series_is_refused() -> None:
    with pytest.raises(DataError, match=r"needs values \(C, T\), a row for each of its 2 columns; got \(3, 4\)"):
        Series("tides", np.zeros((3, 4)), ("a", "b"))
    with pytest.raises(DataError, match="has 1 columns of 0 numbers"):
        Series("tides", np.zeros((1, 0)), ("a",))
    with pytest.raises(DataError, match=r"has 2 steps and times of shape \(1,\)"):
        Series("tides", np.zeros((1, 2)), ("a",), np.zeros(1, "datetime64[us]"))
    with pytest.raises(DataError, match="more than one column named 'a'"):
        Series("tides", np.zeros((2, 2)), ("a", "a"))
