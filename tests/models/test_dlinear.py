import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trimtab.models.dlinear import DLinear, moving_average

X = torch.randn(5, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def dlinear(**options: object) -> DLinear:
    torch.manual_seed(1)
    return DLinear(12, 4, 3, **({"kernel": 5} | options)).double()


@given(arrays.arrays("float64", (2, 3, 8), elements=st.floats(-1e3, 1e3)), st.sampled_from([1, 3, 7, 9, 25]))
def test_the_moving_average_keeps_the_last_values_beyond_the_ends(values: object, kernel: int) -> None:
    x = torch.tensor(values)
    found = moving_average(x, kernel)
    for step in range(8):
        around = [min(max(step + offset, 0), 7) for offset in range(-(kernel // 2), kernel // 2 + 1)]
        assert len(around) == kernel
        torch.testing.assert_close(found[..., step], x[..., around].mean(-1), rtol=1e-12, atol=1e-10)


def test_a_line_is_its_own_average_but_at_the_ends() -> None:
    x = torch.arange(12.0, dtype=torch.float64).expand(1, 1, 12)
    torch.testing.assert_close(moving_average(x, 5)[..., 2:-2], x[..., 2:-2])
    flat = torch.full((1, 1, 12), 7.0, dtype=torch.float64)
    torch.testing.assert_close(moving_average(flat, 25), flat)


@pytest.mark.parametrize("revin", [True, False])
@pytest.mark.parametrize("individual", [True, False])
@torch.no_grad()
def test_it_is_what_loops_compute(individual: bool, revin: bool) -> None:
    model = dlinear(individual=individual, revin=revin)
    found = model(X)
    for b in range(5):
        for c in range(3):
            level = X[b, c].mean() if revin else 0.0
            spread = ((X[b, c] - level).square().mean() + 1e-5).sqrt() if revin else 1.0
            series = (X[b, c] - level) / spread
            trend = torch.stack([series[[min(max(i + o, 0), 11) for o in range(-2, 3)]].mean() for i in range(12)])
            layers = [each[c if individual else 0] for each in (model.trend, model.seasonal)]
            parts = zip(layers, (trend, series - trend), strict=True)
            expected = sum(layer.weight @ part + layer.bias for layer, part in parts) * spread + level
            torch.testing.assert_close(found[b, c], expected, rtol=1e-11, atol=1e-12)


def test_channels_are_apart() -> None:
    changed = X.clone()
    changed[:, 0] += 1
    for individual in (True, False):
        model = dlinear(individual=individual)
        torch.testing.assert_close(model(changed)[:, 1:], model(X)[:, 1:], rtol=0, atol=0)
        assert not torch.allclose(model(changed)[:, 0], model(X)[:, 0])


@pytest.mark.parametrize(("individual", "pairs"), [(False, 1), (True, 3)])
def test_parameters(individual: bool, pairs: int) -> None:
    assert sum(p.numel() for p in dlinear(individual=individual).parameters()) == pairs * 2 * (12 * 4 + 4)


def test_it_is_linear() -> None:
    """Its derivative is the same everywhere, and that of ``W_t A + W_s (1 - A)``, A being the moving average."""
    model = dlinear()
    slope = torch.autograd.functional.jacobian(lambda x: model(x)[0, 0], X[:1])[:, 0, 0]
    average = moving_average(torch.eye(12, dtype=torch.float64).unsqueeze(0), 5)[0].T
    weights = [each[0].weight.detach() for each in (model.trend, model.seasonal)]
    expected = weights[0] @ average + weights[1] @ (torch.eye(12, dtype=torch.float64) - average)
    torch.testing.assert_close(slope, expected, rtol=1e-11, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    for x in (X[0], X[:, :2], X[..., :11], X.long()):
        with pytest.raises(ValueError, match=r"\(B, 3 channels, 12 steps of look-back\), got"):
            dlinear()(x)
    for kernel in (0, 4, -3):
        with pytest.raises(ValueError, match=f"odd kernel, .*; got {kernel}"):
            dlinear(kernel=kernel)
