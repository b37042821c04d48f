import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trimtab.models.revin import RevIN

EPS = 1e-5
VALUES = st.floats(-1e6, 1e6, width=32)
WINDOWS = arrays.arrays("float64", (2, 3, 7), elements=VALUES)


def windows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def affine(*gain: float) -> RevIN:
    module = RevIN(len(gain), affine=True).double()
    with torch.no_grad():
        module.gain.copy_(torch.tensor(gain))
        module.bias.copy_(torch.arange(len(gain)) - 0.5)
    return module


@given(WINDOWS)
def test_the_definition(values: object) -> None:
    x = torch.tensor(values)
    found, (mean, std) = affine(2.0, -0.5, 1.0).normalize(x)
    for b in range(2):
        for c, (gain, bias) in enumerate(((2.0, -0.5), (-0.5, 0.5), (1.0, 1.5))):
            series = x[b, c].tolist()
            level = math.fsum(series) / 7
            spread = math.sqrt(math.fsum((value - level) ** 2 for value in series) / 7 + EPS)
            expected = torch.tensor([gain * (value - level) / spread + bias for value in series], dtype=torch.float64)
            # values of 1e6 in size have a level that is exact to 1e-10, which is 3e-8 of the smallest spread
            torch.testing.assert_close(found[b, c], expected, rtol=1e-7, atol=1e-6)
            assert float(mean[b, c]) == pytest.approx(level, rel=1e-12, abs=1e-9)
            assert float(std[b, c]) == pytest.approx(spread, rel=1e-6)


@given(WINDOWS, arrays.arrays("bool", (2, 3, 7)), st.sampled_from([(), (2.0, -0.5, 1e-9)]))
def test_the_way_back_undoes_the_way_there(values: object, missing: object, gain: tuple[float, ...]) -> None:
    x, missing = torch.tensor(values), torch.tensor(missing)
    module = affine(*gain) if gain else RevIN(3)
    back = module.denormalize(*module.normalize(x.masked_fill(missing, torch.nan)))
    # rounding: 1e-16 of the largest value, by the largest way back (100, of the least gain)
    torch.testing.assert_close(back[~missing], x[~missing], rtol=1e-12, atol=1e-7)
    assert not back.isnan().any()


@given(VALUES, st.integers(1, 600), st.sampled_from([torch.float32, torch.float64]))
def test_a_flat_series_is_zeros_and_comes_back_exactly(level: float, steps: int, dtype: torch.dtype) -> None:
    x = torch.full((1, 2, steps), level, dtype=dtype)
    for module in (RevIN(2), affine(0.0, 3.0).to(dtype)):
        normalized, statistics = module.normalize(x)
        assert torch.equal(module.denormalize(normalized, statistics), x)
        assert torch.equal(normalized - (0 if module.bias is None else module.bias.unsqueeze(-1)), torch.zeros_like(x))
        assert torch.equal(statistics.mean, x[..., :1])
        torch.testing.assert_close(statistics.std, torch.full_like(statistics.std, math.sqrt(EPS)))


@given(WINDOWS, arrays.arrays("bool", (2, 3, 7)))
def test_missing_values_count_for_nothing(values: object, missing: object) -> None:
    x, missing = torch.tensor(values), torch.tensor(missing)
    found, (mean, std) = RevIN(3).normalize(x.masked_fill(missing, torch.nan))
    for b in range(2):
        for c in range(3):
            present = x[b, c][~missing[b, c]]
            assert torch.equal(found[b, c][missing[b, c]], torch.zeros(7 - len(present), dtype=x.dtype))
            if not len(present):
                assert (float(mean[b, c]), float(std[b, c])) == (0.0, pytest.approx(math.sqrt(EPS)))
                continue
            alone, statistics = RevIN(1).normalize(present.view(1, 1, -1))
            torch.testing.assert_close(mean[b, c], statistics.mean[0, 0], rtol=1e-12, atol=1e-9)
            torch.testing.assert_close(std[b, c], statistics.std[0, 0], rtol=1e-6, atol=0)
            torch.testing.assert_close(found[b, c][~missing[b, c]], alone[0, 0], rtol=1e-7, atol=1e-6)


def test_a_forecast_follows_the_units_of_its_window() -> None:
    """Forecasts of a x + b are a f(x) + b; exact but for eps."""
    module, x = RevIN(3, eps=1e-30), windows(4, 3, 20)

    def forecast(x: torch.Tensor) -> torch.Tensor:
        return x[..., -5:].sin()

    found = module(1e3 * x - 7e4, forecast)
    torch.testing.assert_close(found, 1e3 * module(x, forecast) - 7e4, rtol=1e-10, atol=1e-7)


def test_no_state_is_left_behind() -> None:
    module = RevIN(3, affine=True).double()
    before = {name: copy.copy(value) for name, value in vars(module).items()}
    first, second = windows(4, 3, 20), 5 + 3 * windows(2, 3, 9, seed=1)
    normalized, statistics = module.normalize(first)
    module.normalize(second)
    torch.testing.assert_close(module.denormalize(normalized, statistics), first, rtol=1e-13, atol=1e-13)
    assert vars(module) == before
    assert list(module.state_dict()) == ["gain", "bias"]
    assert list(RevIN(3).state_dict()) == []


@pytest.mark.parametrize("gain", [0.0, 1e-12, -1e-12, 0.01, -0.01])
def test_a_gain_near_zero_does_not_blow_up(gain: float) -> None:
    module, x = affine(gain), windows(2, 1, 30)
    normalized, statistics = module.normalize(x)
    moved = module.denormalize(normalized + 1.0, statistics) - x
    torch.testing.assert_close(moved.abs(), (100 * statistics.std).expand_as(x))  # and not 1e12 times
    expected_sign = -1.0 if gain < 0 else 1.0
    assert torch.equal(moved.sign(), torch.full_like(moved, expected_sign))
    normalized.sum().backward()
    assert torch.isfinite(module.gain.grad).all()


def test_a_gain_near_zero_can_grow_again() -> None:
    module, x = affine(0.001), windows(2, 1, 30)
    target = 2 * RevIN(1).normalize(x)[0]
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        (module.normalize(x)[0] - target).square().mean().backward()
        optimizer.step()
    assert module.gain.item() == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("is_missing", [False, True])
def test_gradients_are_those_of_the_function(is_missing: bool) -> None:
    module, x = affine(2.0, -0.5), windows(2, 2, 6).requires_grad_()
    mask = torch.zeros(2, 2, 6, dtype=torch.bool)
    mask[0, 1, 2] = is_missing

    def function(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        def forecast(x: torch.Tensor) -> torch.Tensor:
            return x[..., -3:].square()

        call = (x.masked_fill(mask, torch.nan), forecast)
        return torch.func.functional_call(module, {"gain": gain, "bias": bias}, call)

    assert torch.autograd.gradcheck(function, (x, module.gain, module.bias))


def test_the_gradient_of_a_flat_series_is_finite() -> None:
    x = torch.ones(1, 1, 5, dtype=torch.float64, requires_grad=True)
    RevIN(1)(x, lambda x: x.exp()).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_traced_as_eager() -> None:
    """Where code is traced nothing may hang on what the values are."""
    module, x = affine(2.0, -0.5), windows(4, 2, 9)
    holes = x.clone()
    holes[1, 0, :4] = torch.nan
    for each in (x, holes):
        expected = module(each, torch.cos)
        mapped = torch.vmap(lambda one: module(one.unsqueeze(0), torch.cos).squeeze(0))(each)
        torch.testing.assert_close(mapped, expected, rtol=1e-12, atol=1e-12)
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: module(x, torch.cos), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(each), expected, rtol=1e-12, atol=1e-12)


def test_half_precision_is_normalised_in_single() -> None:
    x = (1000 + windows(2, 3, 50)).bfloat16()
    module = RevIN(3).bfloat16()
    normalized, statistics = module.normalize(x)
    expected, exact = RevIN(3).normalize(x.double())
    assert (normalized.dtype, statistics.mean.dtype, module(x, torch.neg).dtype) == (x.dtype, torch.float32, x.dtype)
    torch.testing.assert_close(statistics.mean.double(), exact.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(normalized.double(), expected, rtol=2**-8, atol=1e-6)  # bfloat16 has 8 bits
    torch.testing.assert_close(module(x, lambda x: x), x, rtol=2**-7, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    module = RevIN(3)
    _, statistics = module.normalize(torch.zeros(2, 3, 5))
    for x in (torch.zeros(2, 4, 5), torch.zeros(3, 5)):
        with pytest.raises(ValueError, match=r"\(B, 3 channels, steps\), got"):
            module.normalize(x)
        with pytest.raises(ValueError, match=r"\(B, 3 channels, steps\), got"):
            module.denormalize(x, statistics)
