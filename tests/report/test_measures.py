from statistics import mean, median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trimtab.report import measures

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5))
LOSSES = SHAPES.flatmap(lambda shape: arrays(np.float64, shape, elements=st.floats(0, 10)))  # (S, L)


def lrs_of(loss: np.ndarray) -> np.ndarray:
    return 10.0 ** np.arange(loss.shape[-1])


def test_lr_sensitivity_is_the_published_formula_with_one_seed() -> None:
    loss = np.array([[0.5, 0.2, 1.1, 2.3]])  # capped at the loss at init, 2.3
    assert measures.lr_sensitivity(loss) == pytest.approx((0.3 + 0.0 + 0.9 + 2.1) / 4)


def test_lr_sensitivity_of_more_seeds_is_the_mean_of_theirs() -> None:
    loss = np.array([[0.5, 0.2], [0.1, 0.9]])
    assert measures.lr_sensitivity(loss) == pytest.approx(mean([0.15, 0.4]))


@given(LOSSES)
def test_lr_sensitivity_is_at_least_zero_and_zero_for_one_lr_or_a_flat_line(loss: np.ndarray) -> None:
    assert measures.lr_sensitivity(loss) >= 0
    assert measures.lr_sensitivity(loss[:, :1]) == 0
    assert measures.lr_sensitivity(np.broadcast_to(loss[:, :1], loss.shape)) == pytest.approx(0, abs=1e-12)


@given(LOSSES, st.floats(0, 5), st.data())
def test_a_worse_run_makes_the_sensitivity_no_smaller(loss: np.ndarray, worse: float, data: st.DataObject) -> None:
    """Unless it is its seed's best run, which is what the others are held against."""
    seed, lr = (data.draw(st.integers(0, size - 1)) for size in loss.shape)
    changed = loss.copy()
    changed[seed, lr] += worse
    best = np.array(0.0)
    assert measures.lr_sensitivity_to(changed, best) >= measures.lr_sensitivity_to(loss, best)
    if lr != loss[seed].argmin():
        assert measures.lr_sensitivity(changed) >= measures.lr_sensitivity(loss) - 1e-12


@given(LOSSES, st.randoms())
def test_the_order_of_the_seeds_does_not_matter(loss: np.ndarray, random: object) -> None:
    order = list(range(len(loss)))
    random.shuffle(order)  # type: ignore[attr-defined]
    initial, lrs = np.full(loss.shape, 10.0), lrs_of(loss)
    for of in (
        measures.lr_sensitivity,
        lambda each: measures.at_best_lr(each, each),
        lambda each: measures.lr_range(each, initial, lrs),
        measures.lowest,
        measures.highest,
        measures.mean,
        measures.middle,
    ):
        np.testing.assert_allclose(of(loss[order]), of(loss), rtol=1e-12, atol=1e-12)


@given(LOSSES)
def test_resamples_are_measured_like_the_seeds_themselves(loss: np.ndarray) -> None:
    """A leading dimension is many measures at once."""
    stack = np.stack([loss, loss[::-1], loss + 1])
    initial, lrs = np.full(stack.shape, 11.0), lrs_of(loss)
    together = measures.lr_range(stack, initial, lrs)
    assert together.tolist() == [measures.lr_range(each, initial[0], lrs) for each in stack]
    together = measures.at_best_lr(stack, stack)
    np.testing.assert_array_equal(together, [measures.at_best_lr(each, each) for each in stack])


def slow_range(loss: np.ndarray, initial: np.ndarray, lrs: np.ndarray, tolerance: float) -> float:
    """Walk from the best learning rate to both sides."""
    middles = [median(column) for column in loss.T]
    start, best = median(initial.ravel()), min(middles)
    if best >= start:
        return 0.0
    low = high = middles.index(best)
    while low > 0 and middles[low - 1] <= best + tolerance * (start - best):
        low -= 1
    while high < len(lrs) - 1 and middles[high + 1] <= best + tolerance * (start - best):
        high += 1
    return float(np.log10(lrs[high]) - np.log10(lrs[low]))


@given(LOSSES, st.sampled_from([0.0, 0.1, 0.5]))
def test_lr_range_against_a_slow_walk(loss: np.ndarray, tolerance: float) -> None:
    initial, lrs = np.full(loss.shape, 8.0), lrs_of(loss)
    got = measures.lr_range(loss, initial, lrs, tolerance)
    assert got == pytest.approx(slow_range(loss, initial, lrs, tolerance))


def test_lr_range_does_not_reach_over_a_gap() -> None:
    loss = np.array([[0.1, 2.0, 0.15, 0.1, 0.12, 2.0]])
    initial = np.full((1, 6), 2.0)
    lrs = np.array([1e-4, 1e-3, 1e-2, 1e-1, 1, 10])
    assert measures.lr_range(loss[:, 1:], initial[:, 1:], lrs[1:]) == pytest.approx(2)
    assert measures.lr_range(loss, initial, lrs) == 0  # the first of two equally good ones stands alone


def test_the_best_lr_is_that_of_the_lowest_median_and_its_value_the_mean() -> None:
    loss = np.array([[0.3, 0.1], [0.3, 0.2], [0.3, 5.0]])
    assert measures.at_best_lr(loss, loss) == pytest.approx((0.1 + 0.2 + 5.0) / 3)
    assert measures.at_best_lr(1 - loss, loss) == pytest.approx(1 - (0.1 + 0.2 + 5.0) / 3)


def test_extremes_pass_over_runs_that_were_not_watched() -> None:
    values = np.array([[0.5, np.nan, 0.2], [0.9, 0.4, np.nan]])
    assert measures.lowest(values) == pytest.approx(0.3)
    assert measures.highest(values) == pytest.approx(0.7)
    assert np.isnan(measures.lowest(np.full((2, 2), np.nan)))
