import math

import pytest

from trimtab.watch.alarms import CollapseAlarm, Head, Reading

HEAD = Head("blocks.2.attention", 3)


def steps_that_alarm(normalized: list[float], threshold: float = 0.03) -> list[int]:
    """Steps 10, 20, ... at which a head with these normalised entropies raises the alarm."""
    alarm = CollapseAlarm(threshold)
    return [
        raised.step
        for index, value in enumerate(normalized, start=1)
        for raised in alarm.check(10 * index, 2.0, {HEAD: Reading(value * 3, value, 100.0)})
    ]


@pytest.mark.parametrize(
    ("normalized", "steps"),
    [
        ([0.5, 0.02, 0.02, 0.01, 0.0], [30]),  # once
        ([0.02, 0.5, 0.02, 0.5], []),  # never twice running
        ([0.5, 0.0, math.nan, 0.0, 0.0], [50]),  # NaN is not low
        ([0.0, 0.0, 0.5, 0.0, 0.0], [20]),  # once, even if it recovers
        ([0.03, 0.03, 0.04], []),  # at the threshold is not below it
    ],
)
def test_two_logged_steps_running_once_per_head(normalized: list[float], steps: list[int]) -> None:
    assert steps_that_alarm(normalized) == steps


def test_zero_switches_it_off() -> None:
    assert steps_that_alarm([0.0, 0.0, 0.0], threshold=0.0) == []


def test_every_head_has_its_own() -> None:
    alarm = CollapseAlarm(0.03)
    low, high = Reading(0.01, 0.005, 900.0), Reading(1.0, 0.5, 3.0)
    other = Head("blocks.0.attention", 0)
    assert not alarm.check(1, 2.0, {HEAD: low, other: high})
    assert [raised.where for raised in alarm.check(20, 2.0, {HEAD: low, other: low})] == ["blocks.2.attention head 3"]
    assert [raised.where for raised in alarm.check(40, 2.0, {HEAD: low, other: low})] == ["blocks.0.attention head 0"]


def test_the_message_says_what_where_since_when_and_what_next() -> None:
    alarm = CollapseAlarm(0.03)
    alarm.check(20, 2.0, {HEAD: Reading(0.01, 0.005, 3812.0)})
    (raised,) = alarm.check(40, 2.31, {HEAD: Reading(0.012, 0.0043, 3812.0)})
    assert (raised.step, raised.kind, raised.value) == (40, "entropy collapse", 0.0043)
    for part in (
        "step 40",
        "blocks.2.attention head 3",
        "0.012 nats",
        "0.0043 of its maximum",
        "below 0.03",
        "since step 20",
        "3812",
        "learning rate",
        "warm",
        "tt.reparametrize_",
        "Low entropy alone is not failure",
        "2.31",
    ):
        assert part in raised.message
