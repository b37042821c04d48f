import math
from dataclasses import replace

import pytest
import torch
from engine_recipes import Small
from hypothesis import given
from hypothesis import strategies as st

from trimtab.train.schedule import learning_rate, learning_rate_factor, set_learning_rates


def test_warmup_rises_linearly_from_zero_to_the_peak() -> None:
    recipe = Small(lr=0.5, warmup_steps=4)
    assert [learning_rate(recipe, step) for step in range(1, 7)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_cosine_ends_at_zero_and_is_half_way_in_the_middle() -> None:
    recipe = Small(schedule="cosine", warmup_steps=4, steps=12)
    assert learning_rate_factor(recipe, 4) == 1
    assert learning_rate_factor(recipe, 8) == pytest.approx(0.5)
    assert learning_rate_factor(recipe, 12) == 0


def test_a_cosine_ends_at_the_lowest_rate() -> None:
    recipe = Small(schedule="cosine", warmup_steps=4, steps=12, lr=0.5, min_lr=0.1)
    rates = [learning_rate(recipe, step) for step in (4, 8, 12)]
    assert rates == pytest.approx([0.5, 0.3, 0.1])


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_a_cosine_that_restarts_is_that_of_torch(warmup_steps: int) -> None:
    recipe = Small(
        schedule="cosine_restarts", restart_every=7, lr=0.5, min_lr=0.01, warmup_steps=warmup_steps, steps=40
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    other = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7, eta_min=0.01)
    for step in range(warmup_steps + 1, 41):
        assert learning_rate(recipe, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        other.step()


@given(st.integers(1, 30), st.floats(0, 1), st.integers(1, 200), st.none() | st.floats(0.1, 1e3), st.floats(0, 1e4))
def test_a_cosine_that_restarts_stays_between_its_ends(
    every: int, lowest: float, step: int, seconds: float | None, elapsed: float
) -> None:
    recipe = Small(schedule="cosine_restarts", restart_every=every, lr=1.0, min_lr=lowest, seconds=seconds, steps=200)
    assert lowest - 1e-12 <= learning_rate(recipe, step, elapsed) <= 1


def test_steps_fall_where_they_should() -> None:
    recipe = Small(schedule="step", step_every=3, step_factor=0.1, warmup_steps=2, steps=20)
    factors = [learning_rate_factor(recipe, step) for step in range(1, 13)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001])


recipes = st.builds(
    Small,
    schedule=st.sampled_from(["constant", "cosine", "step"]),
    warmup_steps=st.integers(0, 50),
    steps=st.integers(1, 200),
    step_every=st.integers(1, 60),
    step_factor=st.floats(0.01, 1.0),
    seconds=st.none() | st.floats(0.1, 1e6),
)
spent = st.floats(0.0, 1e7)


@given(recipes, st.integers(1, 250), spent)
def test_the_factor_is_between_zero_and_one(recipe: Small, step: int, elapsed: float) -> None:
    assert 0 <= learning_rate_factor(recipe, step, elapsed) <= 1


@given(recipes, st.integers(1, 249), spent, spent)
def test_it_only_falls_after_the_warmup(recipe: Small, step: int, elapsed: float, more: float) -> None:
    if step > recipe.warmup_steps:
        later = learning_rate_factor(recipe, step + 1, elapsed + more)
        assert later <= learning_rate_factor(recipe, step, elapsed)


@given(recipes, st.integers(1, 250), spent)
def test_time_counts_only_where_it_is_limited(recipe: Small, step: int, elapsed: float) -> None:
    unlimited = replace(recipe, seconds=None)
    assert learning_rate_factor(unlimited, step, elapsed) == learning_rate_factor(unlimited, step)


@given(st.integers(1, 100), st.floats(0, 1))
def test_the_further_of_steps_and_time_decides(step: int, done: float) -> None:
    """Equal shares of either give the same rate."""
    recipe = Small(schedule="cosine", steps=100, seconds=8.0)
    expected = (1 + math.cos(math.pi * max(step / 100, done))) / 2
    assert learning_rate_factor(recipe, step, done * 8) == pytest.approx(expected, abs=1e-12)


def test_groups_keep_their_ratio() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in "ab")
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    for factor in (0.5, 0.25):
        set_learning_rates([optimizer], factor)
        assert [group["lr"] for group in optimizer.param_groups] == [factor, 0.1 * factor]
