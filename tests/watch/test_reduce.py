import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.watch.alarms import Head, Reading
from trimtab.watch.reduce import Ranks, Sight, combine


def reading(entropy: float, normalized: float, max_logit: float) -> Reading:
    rest = [0.0 for _ in Reading._fields[3:]]
    return Reading(entropy, normalized, max_logit, *rest)


ONE, TWO = Head("blocks.0", 0), Head("blocks.1", 0)


def test_numbers_are_averaged_and_logits_maxed() -> None:
    sights = [
        Sight({"step": 3, "loss": 1.0, "lr": [0.1, 0.2], "sigma": {"w": [2.0]}}, {ONE: reading(1.0, 0.5, 7.0)}),
        Sight({"step": 3, "loss": 3.0, "lr": [0.1, 0.2], "sigma": {"w": [4.0]}}, {ONE: reading(2.0, 0.7, 9.0)}),
    ]
    together = combine(sights)
    assert together.line == {"step": 3, "loss": 2.0, "lr": pytest.approx([0.1, 0.2]), "sigma": {"w": [3.0]}}
    assert together.readings[ONE][:3] == pytest.approx((1.5, 0.6, 9.0))


def test_stages_of_a_pipeline_are_united() -> None:
    first = Sight({"loss": 1.0, "sigma": {"a": [1.0]}}, {ONE: reading(1.0, 0.5, 7.0)})
    last = Sight({"loss": 1.0, "sigma": {"b": [5.0]}, "output_z": 2.0}, {TWO: reading(2.0, 0.7, 9.0)})
    together = combine([first, last])
    assert together.line == {"loss": 1.0, "sigma": {"a": [1.0], "b": [5.0]}, "output_z": 2.0}
    assert together.readings == first.readings | last.readings
    assert list(together.readings) == [ONE, TWO]


def test_what_is_broken_anywhere_stays_broken() -> None:
    healthy = Sight({"loss": 1.0}, {ONE: reading(1.0, 0.5, 7.0)})
    broken = Sight({"loss": math.nan}, {ONE: reading(math.nan, math.nan, math.nan)})
    together = combine([healthy, broken])
    assert math.isnan(together.line["loss"])
    assert all(map(math.isnan, together.readings[ONE][:3]))


def test_a_head_without_a_choice_in_one_process_is_read_where_it_had_one() -> None:
    no_choice = Sight({}, {ONE: reading(0.0, math.nan, 2.0)})
    together = combine([no_choice, Sight({}, {ONE: reading(1.0, 0.5, 1.0)})])
    assert together.readings[ONE][:3] == (0.5, 0.5, 2.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.randoms())
def test_every_process_gets_the_mean_whatever_the_order(losses, random) -> None:
    shuffled = random.sample(losses, len(losses))
    one, two = (combine([Sight({"loss": loss}, {}) for loss in each]).line["loss"] for each in (losses, shuffled))
    assert one == pytest.approx(sum(losses) / len(losses), rel=1e-9, abs=1e-9)
    assert two == pytest.approx(one, rel=1e-9, abs=1e-9)


def test_a_process_alone_is_the_first_and_sees_for_itself() -> None:
    ranks, sight = Ranks(), Sight({"loss": 1.0}, {})
    assert (ranks.size, ranks.first) == (1, True)
    assert ranks.together(sight) is sight
    with pytest.raises(OSError, match="full"):
        ranks.first_does(lambda: (_ for _ in ()).throw(OSError("full")))
