import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.watch.signals.gradients import GradientNoise, averaged, gradient_noise


@settings(deadline=None, max_examples=25)
@given(parts=st.integers(2, 6), size=st.integers(1, 5), seed=st.integers(0, 1000))
def test_the_variance_is_that_of_a_sample(parts, size, seed) -> None:
    """The trace of torch's own unbiased covariance; and the parts of |G|² add up."""
    y = torch.randn(parts, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean_square, square_of_mean = y.square().sum(1).mean().item(), y.mean(0).square().sum().item()
    noise = gradient_noise(mean_square, square_of_mean, parts)
    assert noise.variance == pytest.approx(y.var(0, correction=1).sum().item())
    assert noise.signal + noise.variance / parts == pytest.approx(square_of_mean)


def test_both_are_unbiased() -> None:
    """Averages of many readings of 4 parts come to |mu|² = 25 and to the trace 3 · 4 of the covariance."""
    torch.manual_seed(0)
    mean = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    y = mean + 2 * torch.randn(20000, 4, 3, dtype=torch.float64)
    readings = [
        gradient_noise(a, b, 4)
        for a, b in zip(y.square().sum(-1).mean(-1).tolist(), y.mean(1).square().sum(-1).tolist(), strict=True)
    ]
    variance, signal = torch.tensor(readings).mean(0).tolist()
    assert variance == pytest.approx(12, rel=0.02)  # standard error: 12 sqrt(2 / 9 / 20000) = .04
    assert signal == pytest.approx(25, rel=0.02)  # standard error: about 2 · 5 · 1 / sqrt(20000) = .07
    assert GradientNoise(variance, signal).scale == pytest.approx(12 / 25, rel=0.04)


def test_averages_are_kept_apart() -> None:
    first = averaged(None, GradientNoise(2.0, 1.0))
    second = averaged(first, GradientNoise(4.0, -1.0), decay=0.75)
    assert second == (2.5, 0.5)
    assert second.scale == 5
    assert math.isnan(GradientNoise(4.0, -1.0).scale)


def test_one_part_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 parts"):
        gradient_noise(1.0, 1.0, 1)
