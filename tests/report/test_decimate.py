import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trimtab.report.decimate import decimate

CURVES = arrays(np.float64, st.integers(1, 500), elements=st.floats(-1e9, 1e9))


@given(CURVES, st.sampled_from([4, 10, 50]))
def test_ends_and_extremes_stay(values: np.ndarray, points: int) -> None:
    steps = np.arange(1.0, len(values) + 1)
    kept_steps, kept = decimate(steps, values, points)
    assert len(kept) <= points + 2
    assert (kept_steps[0], kept_steps[-1]) == (1, len(values))
    assert kept.min() == values.min()
    assert kept.max() == values.max()
    assert (np.diff(kept_steps) > 0).all()
    assert (values[kept_steps.astype(int) - 1] == kept).all()  # each at its own step


def test_every_spike_of_a_long_run_survives() -> None:
    values = np.zeros(10_000)
    values[[17, 5000, 5100, 9998]] = [3, 4, 5, 6]
    steps, kept = decimate(np.arange(10_000.0), values)
    assert {3, 4, 5, 6} <= set(kept)
    assert len(steps) <= 202


def test_of_a_constant_the_ends_are_enough() -> None:
    steps, kept = decimate(np.arange(10_000.0), np.full(10_000, 0.1))
    assert (steps.tolist(), kept.tolist()) == ([0, 9999], [0.1, 0.1])


def test_what_is_not_finite_is_left_out() -> None:
    values = np.array([1.0, np.nan, np.inf, 2.0])
    steps, kept = decimate(np.arange(4.0), values)
    assert (steps.tolist(), kept.tolist()) == ([0, 3], [1, 2])
    assert len(decimate(np.arange(2.0), np.full(2, np.nan))[0]) == 0
