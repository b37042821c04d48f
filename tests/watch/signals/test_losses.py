import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.watch.signals.losses import spike_score

numbers = st.floats(-100, 100)


def test_a_score_by_hand() -> None:
    """Median 3, deviations 2 1 0 1 97 with median 1: one more is 1 / 1.4826."""
    assert spike_score([1, 2, 3, 4, 100], 4) == pytest.approx(1 / 1.4826)
    assert spike_score([1, 2, 3, 4, math.nan, 100, math.inf], 4) == spike_score([100, 4, 3, 2, 1], 4)


@given(recent=st.lists(numbers, min_size=5, max_size=20), loss=numbers, factor=st.floats(0.1, 10), shift=numbers)
def test_units_do_not_matter(recent, loss, factor, shift) -> None:
    """Unlike rounding: whole multiples only."""
    recent, loss, factor, shift = [round(x) for x in recent], round(loss), 2.0 ** round(factor), round(shift)
    assert spike_score([factor * x + shift for x in recent], factor * loss + shift) == spike_score(recent, loss)


def test_the_ends() -> None:
    assert spike_score([1.0] * 8, 1.0) == 0
    assert spike_score([1.0] * 8, 1.5) == math.inf
    assert spike_score([1.0] * 8, 0.5) == -math.inf
    assert spike_score([1, 2, 3, 4, 5], math.nan) == spike_score([1, 2, 3, 4, 5], math.inf) == math.inf
    assert math.isnan(spike_score([1, 2, 3, 4, math.nan], 9.0))


def test_a_spike_among_the_recent_does_not_hide_the_next() -> None:
    calm = [2 + 0.01 * (n % 5) for n in range(19)]
    assert spike_score([*calm, 50.0], 50.0) > 100
