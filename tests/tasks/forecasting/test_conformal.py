import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import RecipeError
from trimtab.tasks.forecasting.conformal import conformal_margin, conformal_rank


@pytest.mark.parametrize(
    ("size", "level", "rank"), [(9, 0.9, 9), (19, 0.9, 18), (99, 0.9, 90), (100, 0.9, 91), (1, 0.5, 1), (99, 0.07, 7)]
)
def test_the_rank_is_rounded_up_from_n_plus_one(size: int, level: float, rank: int) -> None:
    assert conformal_rank(size, level) == rank


def test_the_margin_of_errors_1_to_n_is_the_rank_itself_at_every_place() -> None:
    random = np.random.default_rng(0)
    errors = np.stack([random.permutation(np.arange(1.0, 100)) * place for place in (1, 10, 100)], axis=1)
    assert conformal_margin(errors, 0.9).tolist() == [90, 900, 9000]
    assert conformal_margin(errors[:, :2, None], 0.95).tolist() == [[95], [950]]
    quantile = np.quantile(errors, math.ceil(100 * 0.9) / 99, axis=0, method="inverted_cdf")  # as papers write it
    assert conformal_margin(errors, 0.9).tolist() == quantile.tolist()


def test_uniform_errors_have_a_margin_near_the_level() -> None:
    errors = np.abs(np.random.default_rng(1).uniform(-1, 1, 20_000))
    assert conformal_margin(errors, 0.8) == pytest.approx(0.8, abs=0.012)  # four standard deviations, .0028 each


@given(
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=3, max_size=40, unique=True),
    st.integers(1, 99).map(lambda percent: percent / 100),
)
def test_of_exchangeable_errors_just_the_share_is_held_that_is_promised(errors: list[float], level: float) -> None:
    """Each of n + 1 values in turn is what comes, and the others are known: exactly k of the n + 1 are held.

    Where all orders are equally likely, that share is the probability: at least the level, at most 1 / (n + 1) more.
    """
    values = np.array(errors)
    size = len(values) - 1
    try:
        rank = conformal_rank(size, level)
    except RecipeError:
        assert Fraction(repr(level)) * (size + 1) > size
        return
    held = [values[place] <= conformal_margin(np.delete(values, place), level) for place in range(size + 1)]
    assert sum(held) == rank
    assert level <= sum(held) / (size + 1) + 1e-12
    assert sum(held) / (size + 1) < level + 1 / (size + 1) + 1e-12


def test_a_level_that_so_few_errors_cannot_promise_is_refused_with_how_many_do() -> None:
    with pytest.raises(RecipeError, match=r"a level of 0\.9 needs at least 9 windows of validation, and there are 8"):
        conformal_margin(np.arange(8.0), 0.9)
    assert conformal_margin(np.arange(9.0), 0.9) == 8
    with pytest.raises(RecipeError, match="needs at least 99 windows"):
        conformal_margin(np.arange(98.0), 0.99)
    for level in (0, 1, 90, -0.1, float("nan")):
        with pytest.raises(RecipeError, match="level must be above 0 and below 1"):
            conformal_margin(np.arange(9.0), level)
