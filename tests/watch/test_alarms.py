"""The alarms on sequences of logged lines made by hand."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.watch.alarms import KINDS, Alarm, Alarms, Head, Reading, Thresholds
from trimtab.watch.runlog import to_json

LIMITS = Thresholds(
    collapse_entropy=0.03,
    collapse_share=0.5,
    max_logit=1000.0,
    sigma_growth=2.0,
    sigma_steps=50,
    sigma_share=0.5,
    update_ratio=0.2,
    update_share=0.5,
    spike_score=8.0,
    spike_rise=0.2,
    spike_lines=20,
    divergence_rise=0.5,
    dead_entropy=0.999,
    dead_share=0.5,
    dead_lines=4,
    dead_lines_one=8,
    loss_change=0.05,
    lines=2,
)


def heads(normalized: Sequence[float], max_logits: Sequence[float] | None = None) -> dict[Head, Reading]:
    """Heads 0, 1, ... of one module, with these normalised entropies and largest logits."""
    logits = max_logits or [5.0] * len(normalized)
    pairs = zip(normalized, logits, strict=True)
    return {Head("attention", i): Reading(3 * value, value, logit) for i, (value, logit) in enumerate(pairs)}


def raised(lines: Iterable[tuple[Mapping[str, Any], Mapping[Head, Reading]]], every: int = 10) -> list[Alarm]:
    alarms = Alarms(LIMITS)
    return [alarm for i, (line, seen) in enumerate(lines, 1) for alarm in alarms.check(every * i, line, seen)]


def seen(steps: Iterable[Mapping[Head, Reading]]) -> list[tuple[Mapping[str, Any], Mapping[Head, Reading]]]:
    return [({"loss": 2.0}, readings) for readings in steps]


def losses(values: Iterable[float]) -> list[tuple[Mapping[str, Any], Mapping[Head, Reading]]]:
    return [({"loss": value}, {}) for value in values]


def sigmas(*steps: Mapping[str, float], every: int = 10) -> list[tuple[str, int, str]]:
    lines = [({"loss": 2.0, "sigma": {name: [value] for name, value in step.items()}}, {}) for step in steps]
    return [(alarm.kind, alarm.step, alarm.where) for alarm in raised(lines, every)]


def summary(alarms: Iterable[Alarm]) -> list[tuple[str, int, int, str]]:
    return [(alarm.kind, alarm.step, alarm.since, alarm.where) for alarm in alarms]


# entropy collapse


def test_collapse_is_a_matter_of_the_share_of_the_heads() -> None:
    low = heads([0.01] * 4 + [0.5] * 12)
    assert raised(seen([low] * 30)) == []  # as in healthy runs
    half = heads([0.01] * 7 + [0.004] + [0.5] * 8)
    assert summary(raised(seen([low, half, half, half]))) == [("entropy collapse", 30, 20, "attention head 7")]


@pytest.mark.parametrize(
    ("normalized", "steps"),
    [
        ([0.5, 0.02, 0.02, 0.01, 0.0], [30]),  # once
        ([0.02, 0.5, 0.02, 0.5], []),  # never twice running
        ([0.5, 0.0, math.nan, 0.0, 0.0], [50]),  # NaN is not low
        ([0.0, 0.0, 0.5, 0.0, 0.0], [20]),  # once, even if it recovers
        ([0.03, 0.03, 0.04], []),  # at the bound is not below it
    ],
)
def test_collapse_of_an_only_head(normalized: list[float], steps: list[int]) -> None:
    assert [alarm.step for alarm in raised(seen(heads([value]) for value in normalized))] == steps


# logit growth


def test_logit_growth_names_the_worst_head_and_counts_the_others() -> None:
    calm, wild = heads([0.5] * 3, [5.0, 5.0, 5.0]), heads([0.5] * 3, [1001.0, 5.0, 4000.0])
    (alarm,) = raised(seen([calm, wild, wild, wild]))
    assert summary([alarm]) == [("logit growth", 30, 20, "attention head 2")]
    assert alarm.value == 4000.0
    assert "2 of 3" in alarm.message
    assert raised(seen([calm, wild, calm, wild])) == []


def test_heads_that_follow_one_by_one_raise_no_flood() -> None:
    steps = [heads([0.5] * 64, [2000.0] * n + [5.0] * (64 - n)) for n in (*range(65), 64)]
    assert len(raised(seen(steps))) == 4  # at 1, 4, 16 and 64 heads


# sigma growth


def test_sigma_growth_is_a_speed_whatever_the_logging() -> None:
    for every in (1, 5, 10, 25, 50, 100, 200):
        for factor, expected in ((1.95, False), (2.4, True)):
            steps = range(every, 40 * every if every > 10 else 200, every)
            found = sigmas(*({"w": 1.5 * factor ** (step / 50)} for step in steps), every=every)
            assert bool(found) is expected, (every, factor)


def test_sigma_growth_needs_half_of_the_weights() -> None:
    grown = {"a": 6.0, "b": 2.0, "c": 2.0}
    assert sigmas({"a": 2.0, "b": 2.0, "c": 2.0}, *[grown] * 3) == []
    grown["c"] = 8.0
    assert sigmas({"a": 2.0, "b": 2.0, "c": 2.0}, *[grown] * 3) == [("sigma growth", 30, "c")]


def test_growing_up_to_one_is_learning() -> None:
    assert sigmas({"w": 0.1}, {"w": 1.9}, {"w": 1.9}, {"w": 1.9}) == []
    assert sigmas({"w": 0.1}, {"w": 2.1}, {"w": 2.1}) == [("sigma growth", 30, "w")]


def test_of_a_converted_weight_gamma_counts() -> None:
    def alarms(sigma: Sequence[float], gamma: Sequence[float]) -> list[Alarm]:
        pairs = zip(sigma, gamma, strict=True)
        return raised(({"loss": 2.0, "sigma": {"w": [1.0, s]}, "gamma": {"w": [1.0, g]}}, {}) for s, g in pairs)

    assert alarms([1.0, 9.0, 9.0, 9.0], [1.0] * 4) == []
    assert summary(alarms([1.0] * 4, [1.0, -9.0, -9.0, -9.0])) == [("sigma growth", 30, 20, "w")]


# large updates


RISING = (2.0, 2.2, 2.4, 2.6)


def updates(
    *steps: Mapping[str, float], converted: Iterable[str] = (), losses: Sequence[float] = RISING
) -> list[Alarm]:
    gammas = {"sigma": {name: [1.0] for name in converted}, "gamma": {name: [1.0] for name in converted}}
    pairs = zip(losses, steps, strict=False)
    return raised(({"loss": loss, "update_ratio": step, **gammas}, {}) for loss, step in pairs)


def test_large_updates_are_told_of_on_the_second_line_once() -> None:
    (alarm,) = updates(*[{"a": 0.1, "b": 0.3, "c": 0.25}] * 4)
    assert summary([alarm]) == [("large updates", 20, 10, "b")]
    assert "30% of its norm" in alarm.message
    assert "2 of 3" in alarm.message


@pytest.mark.parametrize(
    "ratios",
    [
        {"a": 0.2, "b": 0.2, "c": 0.2},  # at the bound is not above it
        {"a": 0.9, "b": 0.9, "c": 0.1, "d": 0.1},  # half, as of weights of which half began at zero
        {"a": math.nan, "b": math.nan, "c": 0.3},  # NaN is not large
        {},
    ],
)
def test_no_large_updates(ratios: dict[str, float]) -> None:
    assert updates(*[ratios] * 3) == []


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([4.0, 3.9, 3.5, 3.0], []),  # weights that start small, and learn
        ([2.0, 2.0, 2.0, 2.0], []),
        ([2.0, 2.04, 2.0, 2.04], []),  # noise: 0.04 of a span of 1
        ([2.0, 2.06, 2.0, 2.0], [20]),
        ([4.0, 3.9, 5.0, 6.0], [30]),  # from [4] to [3.9, 5], a rise of 0.45 in a span of 2
    ],
)
def test_large_updates_matter_while_the_loss_rises(losses: list[float], steps: list[int]) -> None:
    assert [alarm.step for alarm in updates(*[{"a": 0.9}] * 4, losses=losses)] == steps


def test_large_updates_on_one_line_are_a_start() -> None:
    assert updates({"a": 0.9}, {"a": 0.1}, {"a": 0.9}, {"a": 0.1}) == []


def test_updates_of_converted_weights_do_not_count() -> None:
    ratios = [{"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.1}] * 2
    assert updates(*ratios, converted=["a", "b"]) == []  # one of four is no half, though it is one of two
    assert [alarm.where for alarm in updates(*ratios, converted=["d"])] == ["a"]


# loss spike and divergence

NOISE = [2.0 + 0.02 * (-1) ** i for i in range(20)]


def test_a_spike_is_told_of_each_time_it_comes() -> None:
    line = [*NOISE, 4.0, *NOISE, 4.0, 4.5, *NOISE]
    assert [(kind, step, where) for kind, step, _, where in summary(raised(losses(line)))] == [
        ("loss spike", 210, "loss"),
        ("loss spike", 420, "loss"),
    ]


@pytest.mark.parametrize(
    "values",
    [
        [2.0, 4.0, 2.0, 4.0],  # too early to say
        [2.0 + (-1) ** i for i in range(40)],  # this loss is always so
        [*NOISE, 2.2, *NOISE],  # far outside the noise, but a trifle
        [4.0 * 0.9**i for i in range(60)],  # falls
    ],
)
def test_no_spike(values: list[float]) -> None:
    assert raised(losses(values)) == []


def test_divergence_when_the_loss_has_come_back_up() -> None:
    down = [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0]  # lowest 1, span 3
    up = [1.0 + 0.2 * i for i in range(1, 16)]
    found = [alarm for alarm in raised(losses(down + up)) if alarm.kind == "divergence"]
    (alarm,) = found  # once: 2.5 is the bound, the median of five lags by two, and it must hold on two lines
    assert alarm.value == pytest.approx(2.8)
    assert (alarm.since, alarm.step) == (10 * (len(down) + 10), 10 * (len(down) + 11))
    assert raised(losses(down + [1.0 + 0.1 * i for i in range(1, 15)] + [2.4] * 9)) == []


# dead head


def test_dead_heads_many_for_some_time_or_one_for_long() -> None:
    one, many = heads([1.0, 0.5, 0.5, 0.5]), heads([1.0, 0.9995, 0.5, 0.5])
    assert summary(raised(seen([one] * 9))) == [("dead head", 80, 10, "attention head 0")]
    assert summary(raised(seen([one, *[many] * 6]))) == [("dead head", 50, 10, "attention head 0")]
    assert raised(seen([one] * 7 + [heads([0.5] * 4)] + [one] * 7)) == []


def test_many_dead_heads_on_the_first_line_are_a_start_and_get_more_time() -> None:
    many, alive = heads([1.0, 0.9995, 0.5, 0.5]), heads([0.5] * 4)
    assert summary(raised(seen([many] * 9))) == [("dead head", 80, 10, "attention head 0")]
    assert raised(seen([*[many] * 7, alive, *[many] * 7])) == []


def test_heads_are_not_called_dead_while_the_loss_falls() -> None:
    dead = heads([1.0, 1.0, 1.0, 0.5])

    def steps(values: Iterable[float]) -> list[int]:
        lines = (({"loss": value}, dead if i else heads([0.5] * 4)) for i, value in enumerate(values))
        return [alarm.step for alarm in raised(lines)]

    assert steps(4.0 - 0.1 * i for i in range(30)) == []
    # The older half must have come down too: five of ten losses at 2 have a median of 2.
    assert steps([4.0, 3.0, *[2.0] * 30]) == [100]
    # Of the twenty losses up to the 30th the older half has the median 2.55, the newer 2.5: a fall of 0.05, span 2.
    assert steps([4.0 - 0.1 * min(i, 15) for i in range(40)]) == [300]
    assert steps(4.0 + 0.1 * i for i in range(9)) == [50]


def test_heads_are_not_called_dead_while_the_learning_rate_is_warmed_up() -> None:
    dead, rates = heads([1.0]), [1e-3 * min(1.0, i / 12) for i in range(1, 31)]
    assert summary(raised(({"loss": 2.0, "lr": [0.0, lr]}, dead) for lr in rates)) == [
        ("dead head", 130, 10, "attention head 0")  # on the first line on which the rate rises no more
    ]


# non-finite


@pytest.mark.parametrize(
    ("line", "readings", "where"),
    [
        ({"loss": math.nan}, {}, "loss"),
        ({"loss": "inf"}, {}, "loss"),  # as a run log holds it
        ({"loss": 1.0}, heads([math.nan, 0.5], [math.nan, 5.0]), "logits of attention head 0"),
        ({"loss": 1.0, "sigma": {"w": [1.0, math.nan]}}, {}, "w"),
    ],
)
def test_non_finite_at_once_and_once(line: dict[str, Any], readings: dict[Head, Reading], where: str) -> None:
    assert summary(raised([(line, readings)] * 5)) == [("non-finite", 10, 10, where)]


def test_gradients_alone_must_stay_so_as_a_grad_scaler_skips_a_step_now_and_then() -> None:
    calm, skipped = ({"loss": 1.0, "grad_norm": 1.0}, {}), ({"loss": 1.0, "grad_norm": math.inf}, {})
    assert raised([calm, skipped, calm, skipped, calm]) == []
    assert summary(raised([calm, skipped, skipped, skipped])) == [("non-finite", 30, 20, "grad_norm")]
    broken = ({"loss": 1.0, "grad_norm": math.nan, "sigma": {"w": [math.nan]}}, {})
    assert summary(raised([calm, broken]))[0][:3] == ("non-finite", 20, 20)


def test_what_is_no_fault() -> None:
    assert raised(seen([heads([math.nan], [-math.inf])] * 5)) == []  # a head that sees no key
    assert raised(seen([heads([0.5], [math.nan])] * 5)) == []  # one of which only the weights were seen


# what is said


def test_a_message_says_what_where_since_when_how_sure_and_what_next() -> None:
    (alarm,) = raised(seen([heads([0.5, 0.5]), heads([0.012, 0.5]), heads([0.0043, 0.5])]))
    assert (alarm.kind, alarm.value) == ("entropy collapse", 0.0043)
    assert 0 < alarm.confidence < 1
    for part in (
        *("step 30", "entropy collapse", "attention head 0", "0.0043 of", "0.03", "since step 20", "1 of 2"),
        *(f"{alarm.confidence:.0%}", "learning rate", "tt.reparametrize_", "Low entropy alone is not failure"),
    ):
        assert part in alarm.message


@pytest.mark.parametrize(("energy", "words"), [(0.9, "90% of"), (0.1, "trains on"), (0.9, "crashes")])
def test_a_collapse_is_told_with_what_the_weights_say_of_it(energy: float, words: str) -> None:
    low = heads([0.01])
    slow = {"loss": 2.0, "qk_energy": {"attention": [energy]}}  # not on every line
    (alarm,) = raised([(slow, low), ({"loss": 2.0}, low), ({"loss": 2.0}, low)])
    assert words in alarm.message


# thresholds


def test_none_switches_an_alarm_off() -> None:
    off = Thresholds(
        collapse_entropy=None,
        max_logit=None,
        sigma_growth=None,
        update_ratio=None,
        spike_score=None,
        divergence_rise=None,
        dead_entropy=None,
    )
    alarms, loss = Alarms(off), [*NOISE, 90.0, *[80.0] * 9]
    for i, value in enumerate(loss):
        readings = heads([0.0, 1.0], [1e6, 5.0])
        assert alarms.check(i, {"loss": value, "sigma": {"w": [2.0**i]}, "update_ratio": {"w": 9.0}}, readings) == []


@pytest.mark.parametrize("wrong", [{"collapse_entropy": 1.5}, {"max_logit": -1.0}, {"lines": 0}, {"dead_share": None}])
def test_a_threshold_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Thresholds(**wrong)


# laws

NUMBERS = st.one_of(
    st.floats(-10, 10), st.sampled_from([0.0, 0.01, 1.0, 1e4, 1e30, math.nan, math.inf, -math.inf]), st.floats(1, 1e4)
)
LINES = st.lists(st.tuples(*[NUMBERS] * 11), min_size=1, max_size=40)


def line_and_readings(numbers: Sequence[float], order: Sequence[int]) -> tuple[dict[str, Any], dict[Head, Reading]]:
    loss, grad_norm, sigma, gamma, ratio, *of_heads = numbers
    line = {"loss": loss, "grad_norm": grad_norm, "sigma": {"a": [sigma], "b": [2.0]}, "gamma": {"b": [gamma]}}
    line["update_ratio"] = {"a": ratio, "b": 0.9}
    line["lr"] = [ratio]
    line["qk_energy"] = {"m": [0.9, gamma, 0.1]}
    return line, {Head("m", i): Reading(1.0, of_heads[2 * i], of_heads[2 * i + 1]) for i in order}


@given(LINES, st.permutations(range(3)))
def test_the_order_of_heads_is_irrelevant(lines: list[tuple[float, ...]], order: list[int]) -> None:
    first = raised(line_and_readings(numbers, range(3)) for numbers in lines)
    other = raised(line_and_readings(numbers, order) for numbers in lines)
    assert repr(first) == repr(other)  # repr, as NaN is not equal to itself


@given(LINES, st.data())
def test_a_resumed_run_decides_as_an_unbroken_one(lines: list[tuple[float, ...]], data: st.DataObject) -> None:
    broken = data.draw(st.integers(0, len(lines)))
    unbroken = raised(line_and_readings(numbers, range(3)) for numbers in lines)
    alarms, found = Alarms(LIMITS), []
    for i, numbers in enumerate(lines):
        if i == broken:
            state = json.loads(to_json(alarms.state()))
            alarms = Alarms(LIMITS)
            alarms.load(state)
        found += alarms.check(10 * (i + 1), *line_and_readings(numbers, range(3)))
    assert repr(found) == repr(unbroken)


@given(LINES)
def test_whatever_comes_alarms_are_few_and_whole(lines: list[tuple[float, ...]]) -> None:
    found = raised(line_and_readings(numbers, range(3)) for numbers in lines)
    for alarm in found:
        assert alarm.kind in KINDS
        assert 0 < alarm.since <= alarm.step
        assert math.isnan(alarm.confidence) or 0 <= alarm.confidence <= 1
        json.loads(to_json(alarm.__dict__))
    for kind in KINDS:
        if kind != "loss spike":
            # the most places there are is seven: loss, gradients, 3 heads, 2 weights; so one alarm, and one at four
            assert sum(alarm.kind == kind for alarm in found) <= 2
