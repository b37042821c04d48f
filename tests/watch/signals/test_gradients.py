import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.watch.signals.gradients import (
    GradientNoise,
    averaged,
    gradient_moments,
    gradient_noise,
    gradient_variances,
)


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


def test_the_variance_over_entries_is_that_of_numpy_over_a_whole_layer() -> None:
    torch.manual_seed(0)
    shapes = {"blocks.0.a": (3, 5), "blocks.0.b": (7,), "blocks.1.a": (4,), "head": (2, 2), "unused": (2,)}
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    for number, (name, parameter) in enumerate(parameters.items()):
        if name != "unused":
            parameter.grad = 0.3 * number + torch.randn_like(parameter)  # means that differ
    found = gradient_variances(gradient_moments(parameters), lambda name: name.rpartition(".")[0] or name)
    together = torch.cat([parameters[name].grad.flatten() for name in ("blocks.0.a", "blocks.0.b")])
    expected = {
        "blocks.0": together.double().numpy().var(),
        "blocks.1": parameters["blocks.1.a"].grad.double().numpy().var(),
        "head": parameters["head"].grad.double().numpy().var(),
    }
    assert found == pytest.approx(expected, rel=1e-6)  # sums in float32


def test_the_variance_over_entries_of_other_kinds_of_gradients() -> None:
    """Rows that a sparse gradient lacks are zero; a constant has none, though rounding may say less; NaN stays."""
    table, flat, broken = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    table(torch.tensor([1, 1, 3])).square().sum().backward()
    flat.grad, broken.grad = torch.full((3,), 0.1), torch.tensor([torch.nan, 1.0])
    parameters = {"table": table.weight, "flat": flat, "broken": broken}
    found = gradient_variances(gradient_moments(parameters), str)
    assert found["table"] == pytest.approx(table.weight.grad.to_dense().var(correction=0).item())
    assert found["flat"] == pytest.approx(0.0, abs=1e-9)
    assert found["flat"] >= 0
    assert math.isnan(found["broken"])
    assert gradient_moments({"none": nn.Parameter(torch.zeros(2))}) == {}
