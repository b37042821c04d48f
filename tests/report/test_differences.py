import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.report.differences import differences, holm, interval, resamples, student_t_p, winner


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272)]
)
def test_student_t_at_the_tabulated_five_per_cent(degrees: int, t: float) -> None:
    assert student_t_p(t, degrees) == pytest.approx(0.05, rel=1e-5)
    assert student_t_p(-t, degrees) == student_t_p(t, degrees)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 19])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0, 20.0])
def test_student_t_against_the_integral_of_its_density(degrees: int, t: float) -> None:
    grid = np.linspace(0, t, 40_001)
    constant = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    density = constant * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
    inside = float(np.sum((density[1:] + density[:-1]) / 2) * t / 40_000)
    assert student_t_p(t, degrees) == pytest.approx(1 - 2 * inside, abs=1e-6)


def test_what_rounding_leaves_of_a_difference_is_not_told() -> None:
    values = {"none": 0.1 + 0.2, "sigma": 0.3, "clip": 0.4}  # 0.30000000000000004
    draws = {arm: np.full(10, value) for arm, value in values.items()}
    told = {(each.first, each.second): each.told for each in differences(values, draws, 5)}
    assert told == {("none", "sigma"): False, ("none", "clip"): True, ("sigma", "clip"): True}


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    corrected = holm([math.nan, 0.02])
    assert math.isnan(corrected[0])
    assert corrected[1] == 0.02
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_as_its_step_down_procedure_does(p_values: list[float]) -> None:
    rejected = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        if p_values[index] * (len(p_values) - rank) > 0.05:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


def means(values: dict[str, list[float]]) -> tuple[dict[str, float], dict[str, np.ndarray], int]:
    """The mean over the seeds, as a measure: values, resampled values, number of seeds."""
    seeds = len(next(iter(values.values())))
    drawn = resamples(seeds)
    arrays = {arm: np.array(each) for arm, each in values.items()}
    return (
        {arm: float(each.mean()) for arm, each in arrays.items()},
        {arm: each[drawn].mean(axis=1) for arm, each in arrays.items()},
        seeds,
    )


def test_a_mean_over_the_seeds_gets_the_paired_t_test() -> None:
    a, b = [0.50, 0.61, 0.55, 0.70, 0.58], [0.41, 0.47, 0.50, 0.55, 0.49]
    gaps = np.subtract(a, b)
    t = gaps.mean() / (gaps.std(ddof=1) / math.sqrt(5))
    [found] = differences(*means({"a": a, "b": b}))
    assert found.value == pytest.approx(gaps.mean())
    # 4,000 resamples know the standard error to about 1.5 %; p falls with a power of t near 4
    assert found.p == pytest.approx(student_t_p(t, 4), rel=0.15)
    assert found.low < gaps.mean() < found.high
    assert found.told


def test_seeds_are_resampled_together() -> None:
    """What a seed does to both arms leaves their difference."""
    a = [0.5, 5.5, 1.5, 9.5, 3.5]
    [found] = differences(*means({"a": a, "b": [value - 0.1 + place / 1000 for place, value in enumerate(a)]}))
    assert found.told
    assert (found.low, found.high) == (pytest.approx(0.098, abs=0.002), pytest.approx(0.098, abs=0.002))


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_fewer_than_three_seeds_nothing_is_told(seeds: int) -> None:
    [found] = differences(*means({"a": [0.1, 0.11][:seeds], "b": [9.0, 9.01][:seeds]}))
    assert not found.told
    assert math.isnan(found.p)


def test_a_single_seed_has_no_interval() -> None:
    assert all(map(math.isnan, interval(np.ones(100), 1)))
    assert interval(np.ones(100), 2) == (1, 1)


def test_an_unknown_value_is_told_from_nothing() -> None:
    values, draws, seeds = means({"a": [1.0, 1.1, 1.2], "b": [math.nan] * 3, "c": [5.0, 5.1, 5.2]})
    found = {(each.first, each.second): each for each in differences(values, draws, seeds)}
    assert not found["a", "b"].told
    assert found["a", "c"].told
    assert winner(values, list(found.values()), higher_is_better=False) == "a"


def test_a_winner_must_be_told_from_every_other() -> None:
    values, draws, seeds = means({"a": [1.0, 1.1, 1.2, 1.1], "b": [1.1, 1.0, 1.1, 1.2], "c": [5.0, 5.2, 5.1, 5.2]})
    found = differences(values, draws, seeds)
    assert winner(values, found, higher_is_better=False) is None
    assert winner(values, found, higher_is_better=True) == "c"
    assert winner({"a": 1.0}, [], higher_is_better=True) is None


def test_a_measure_in_steps_is_not_told_by_one_step() -> None:
    values, draws, seeds = means({"a": [0.0] * 3, "b": [1.0] * 3})
    assert differences(values, draws, seeds)[0].told  # without a step, equal seeds are taken at their word
    assert not differences(values, draws, seeds, step=1.0)[0].told


def test_arms_that_are_the_same_are_told_apart_in_five_per_cent_of_cases() -> None:
    rng = np.random.default_rng(0)
    trials, hits = 400, 0
    for _ in range(trials):
        a, b = rng.normal(size=(2, 5))
        hits += differences(*means({"a": list(a), "b": list(b)}))[0].told
    assert hits / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
