from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import DataError
from trimtab.tasks.forecasting.timestamps import Frequency, check_order, frequency_of, parse_dates

SECOND = 1_000_000
HOUR, DAY = 3600 * SECOND, 86_400 * SECOND
WEEKDAYS = (*range(6, 11), *range(13, 18), *range(20, 25))  # of January 2020


def where(row: int) -> str:
    return f"row {row}"


def times(*texts: str) -> np.ndarray:
    return np.array(texts, dtype="datetime64[us]")


WRITTEN = [
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%dT%H:%M:%S",
    "%Y/%m/%d %H:%M",
    "%d.%m.%Y %H:%M:%S",
    "%d/%m/%Y %H:%M",
    "%m/%d/%Y %H:%M",
    "%Y%m%d",
    "%Y-%m-%d",
]


@pytest.mark.parametrize("form", WRITTEN)
def test_dates_are_read_however_they_are_written(form: str) -> None:
    days = [datetime(2020, 1, 28) + timedelta(days=day, hours=0 if "H" not in form else 5) for day in range(9)]
    found = parse_dates([day.strftime(form) for day in days], where)
    assert found.tolist() == days
    assert found.dtype == np.dtype("datetime64[us]")


def test_single_digits_as_in_a_spreadsheet_and_months_alone() -> None:
    assert parse_dates(["1990/1/1 0:00", "1990/1/2 0:00"], where).tolist() == [
        datetime(1990, 1, 1),
        datetime(1990, 1, 2),
    ]
    assert parse_dates(["1990-11", "1990-12"], where).tolist() == [datetime(1990, 11, 1), datetime(1990, 12, 1)]


def test_a_time_zone_becomes_utc() -> None:
    found = parse_dates(["2024-03-31T01:30:00+01:00", "2024-03-31T03:30:00+02:00"], where)
    assert found.tolist() == [datetime(2024, 3, 31, 0, 30), datetime(2024, 3, 31, 1, 30)]
    with pytest.raises(DataError, match="row 1: a date without a time zone, where others have one"):
        parse_dates(["2024-03-31T01:30:00Z", "2024-03-31T03:30:00"], where)


def test_days_and_months_are_told_apart_by_what_rises_or_not_at_all() -> None:
    days = parse_dates(["30/01/2020", "31/01/2020", "01/02/2020"], where)  # 31 is no month
    assert days.tolist()[-1] == datetime(2020, 2, 1)
    # with the month first, the third would come before the second
    rising = parse_dates(["01/02/2020", "12/02/2020", "03/03/2020"], where)
    assert rising.tolist() == [datetime(2020, 2, 1), datetime(2020, 2, 12), datetime(2020, 3, 3)]
    with pytest.raises(DataError, match="the dates from row 0 on can be read with the day or the month first"):
        parse_dates(["01/02/2020", "02/03/2020"], where)


def test_the_first_cell_that_is_no_date_is_told() -> None:
    with pytest.raises(DataError, match=r"row 2: '32\.01\.2020' is no date like those before it"):
        parse_dates(["30.01.2020", "31.01.2020", "32.01.2020"], where)


def test_times_that_do_not_rise_are_refused_with_their_place_and_number() -> None:
    check_order(times("2020-01-01", "2020-01-02", "2020-01-05"), where)
    with pytest.raises(DataError, match=r"row 2: 2020-01-02 00:00:00 comes again after 2020-01-02 00:00:00 \(1 s"):
        check_order(times("2020-01-01", "2020-01-02", "2020-01-02"), where)
    with pytest.raises(DataError, match=r"row 1: 2020-01-01 00:00:00 comes before 2020-01-03 00:00:00 \(2 such"):
        check_order(times("2020-01-03", "2020-01-01", "2020-01-02", "2020-01-01"), where)


@pytest.mark.parametrize(
    ("found", "frequency", "uneven"),
    [
        (times("2020-01-01T00", "2020-01-01T01", "2020-01-01T02"), Frequency(HOUR), 0),
        (times("2020-01-01T00", "2020-01-01T01", "2020-01-01T02", "2020-01-01T09"), Frequency(HOUR), 1),
        (times("2020-01-03", "2020-01-06", "2020-01-07", "2020-01-08"), Frequency(DAY), 1),  # a weekend
        (times("2020-01-01", "2020-02-01", "2020-03-01"), Frequency(1, "month"), 0),
        (times("2020-01-31", "2020-02-29", "2020-03-31"), Frequency(1, "month end"), 0),
        (times("2020-03-31", "2020-06-30", "2020-09-30", "2021-06-30"), Frequency(3, "month end"), 1),
        (times("2018-07-01", "2019-07-01", "2020-07-01"), Frequency(12, "month"), 0),
        (times("2024-01-30", "2024-02-29", "2024-03-30"), Frequency(1, "month", 30), 0),
        (times("2023-01-29", "2023-02-28", "2023-03-29"), Frequency(1, "month", 29), 0),
        (times("2023-03-30", "2023-04-30", "2023-05-30", "2023-07-30"), Frequency(1, "month", 30), 1),
        (times("2023-01-30", "2023-02-27", "2023-03-30"), Frequency(28 * DAY), 1),  # the 27th is not its last day
        (times(*[f"2020-01-{day:02}T09" for day in WEEKDAYS]), Frequency(1, "business day"), 0),
        (times(*[f"2020-01-{day:02}T09" for day in WEEKDAYS if day != 8]), Frequency(1, "business day"), 1),
        (times("2020-01-03", "2020-01-10", "2020-01-17"), Frequency(7 * DAY), 0),  # Fridays
        (times("2020-01-01"), None, 0),
    ],
)
def test_the_usual_distance_and_how_often_it_is_another(found: np.ndarray, frequency: Frequency, uneven: int) -> None:
    assert frequency_of(found) == (frequency, uneven)


def test_a_season_is_a_day_a_week_or_a_year() -> None:
    minutes = {1: 1440, 10: 144, 15: 96, 60: 24, 720: 2, 7: None}
    assert {count: Frequency(count * 60 * SECOND).season() for count in minutes} == minutes
    days = {1: 7, 7: 52, 2: None, 30: None}
    assert {count: Frequency(count * DAY).season() for count in days} == days
    months = {1: 12, 3: 4, 6: 2, 12: None, 5: None}
    assert {count: Frequency(count, "month end").season() for count in months} == months
    assert {count: Frequency(count, "business day").season() for count in (1, 2)} == {1: 5, 2: None}


@given(
    st.datetimes(datetime(1950, 1, 1), datetime(2050, 1, 1)).map(lambda time: time.replace(microsecond=0)),
    st.sampled_from([SECOND, 600 * SECOND, HOUR, DAY, 7 * DAY]),
)
def test_what_comes_after_goes_on_at_the_same_distance(first: datetime, count: int) -> None:
    series = np.datetime64(first, "us") + np.arange(5) * np.timedelta64(count, "us")
    frequency, uneven = frequency_of(series)
    assert frequency is not None
    assert uneven == 0
    assert frequency.after(series[1], 3).tolist() == series[2:].tolist()


def test_business_days_that_come_after_leave_out_weekends() -> None:
    ahead = Frequency(1, "business day").after(np.datetime64("2020-01-23T09:30"), 3)  # a Thursday
    assert ahead.tolist() == [datetime(2020, 1, day, 9, 30) for day in (24, 27, 28)]


def test_months_that_come_after_are_as_long_as_they_are() -> None:
    assert Frequency(1, "month").after(np.datetime64("2020-12-15T06:00"), 2).tolist() == [
        datetime(2021, 1, 15, 6),
        datetime(2021, 2, 15, 6),
    ]
    days = Frequency(1, "month").after(np.datetime64("2024-01-30T06:00"), 3)
    assert days.tolist() == [datetime(2024, 2, 29, 6), datetime(2024, 3, 30, 6), datetime(2024, 4, 30, 6)]
    ends = Frequency(1, "month end").after(np.datetime64("2023-12-31T23:00"), 3)
    assert ends.tolist() == [datetime(2024, 1, 31, 23), datetime(2024, 2, 29, 23), datetime(2024, 3, 31, 23)]
