"""Half precision, as weights and under autocast: dtypes, closeness to float64, gradient scaling."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import sigma_gamma

MakeMixed = Callable[..., tuple[Any, Tensor]]
InUse = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# The inputs make each of input, weight and output the smallest in turn, which is where the scale goes.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear-few-tokens": (lambda: nn.Linear(64, 48), (8, 64), 1),
    "linear-few-rows": (lambda: nn.Linear(64, 12), (8, 64), 1),
    "linear-many-tokens": (lambda: nn.Linear(64, 48), (500, 64), 1),
    "linear-four-blocks": (lambda: nn.Linear(64, 48), (8, 64), 4),
    "conv-small-input": (lambda: nn.Conv1d(64, 128, 3), (1, 64, 4), 1),
    "conv": (lambda: nn.Conv2d(8, 16, 3), (4, 8, 9, 9), 1),
}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).detach().norm() / b.detach().norm())


@HALF
@pytest.mark.parametrize("how", ["autocast", "half weights"])
@pytest.mark.parametrize(("make", "shape", "blocks"), LAYERS.values(), ids=LAYERS.keys())
def test_output_and_gradients_are_those_of_float64_to_a_few_roundings(
    make: Callable[[], nn.Module], shape: tuple[int, ...], blocks: int, how: str, dtype: torch.dtype, in_use: InUse
) -> None:
    torch.manual_seed(1)
    plain, x = make(), torch.randn(shape)
    layer = tt.reparametrize_(copy.deepcopy(plain), tt.SigmaReparam(blocks=lambda module, name: blocks))
    with torch.no_grad():
        layer.gamma.mul_(1.3)
    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact_x = x.double().requires_grad_()
    used = in_use(copy.deepcopy(layer).double(), exact)
    used["weight"].retain_grad()
    expected = torch.func.functional_call(plain.double(), used, (exact_x,))
    seed = torch.randn_like(expected)
    expected.backward(seed)

    if how == "half weights":
        layer, x = layer.to(dtype), x.to(dtype)
    x.requires_grad_()
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        output = layer(x)
    assert output.dtype == dtype
    output.backward(seed.to(dtype))
    # Input, weight and result are each rounded, by eps / 2 at most; sums are kept in float32.
    tolerance = 1.5 * torch.finfo(dtype).eps
    assert relative(output, expected) < tolerance
    assert relative(x.grad, exact_x.grad) < tolerance
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        if name != "gamma":
            assert relative(parameter.grad, exact[name].grad) < tolerance
    # The gradient of gamma, <G, W> / sigma, may be a small difference of large numbers.
    scale = used["weight"].grad.norm() * exact["weight"].norm() / sigma_gamma(layer)["weight"][0].min()
    assert float((layer.gamma.grad - exact["gamma"].grad).norm() / scale.detach()) < tolerance


@HALF
@pytest.mark.parametrize("tokens", [8, 64], ids=["scale-on-output", "scale-on-weight"])
def test_the_scale_itself_is_not_rounded(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = tt.reparametrize_(nn.Linear(64, 12, bias=False, dtype=dtype))
    with torch.no_grad():
        layer.gamma.mul_(1.3)
    sigma, gamma = sigma_gamma(layer)["weight"]
    expected = (layer.weight.float() * (gamma / sigma)).to(dtype)  # rounded once
    one_hot = torch.eye(64, dtype=dtype)[:tokens]
    assert torch.equal(layer(one_hot), expected.t()[:tokens])
    assert torch.equal(tt.effective_weight(layer), expected)


@HALF
@pytest.mark.parametrize("vectors", [1, 4])
def test_vectors_of_half_weights_are_iterated_in_float32(mixed: MakeMixed, dtype: torch.dtype, vectors: int) -> None:
    model, _ = mixed()
    tt.reparametrize_(model.to(dtype), tt.SigmaReparam(vectors=vectors))
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.ndim > 1):
            weight.add_(0.1 * torch.randn_like(weight))
    exact = copy.deepcopy(model).double()  # of the same rounded weights
    for _ in range(3):
        tt.refresh_(model)
        tt.refresh_(exact)
    for name, (sigma, gamma) in sigma_gamma(model).items():
        assert sigma.dtype == gamma.dtype == torch.float32
        torch.testing.assert_close(sigma.double(), sigma_gamma(exact)[name][0], rtol=1e-5, atol=0)


@HALF
def test_half_weights_train_with_gamma_in_float32(mixed: MakeMixed, dtype: torch.dtype) -> None:
    model, x = mixed()
    tt.reparametrize_(model).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (model(x.to(dtype)).float() - 0.1).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    for name, tensor in model.state_dict().items():
        carried = "gamma" in name or "sigma" in name
        assert tensor.dtype == (torch.float32 if carried else dtype), name
        assert torch.isfinite(tensor).all()


def autocast_run(model: nn.Module, x: Tensor, scaler: torch.amp.GradScaler) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x).float() - 0.1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def test_a_gradient_scaler_changes_no_bit_where_nothing_over_or_underflows(mixed: MakeMixed) -> None:
    (model, x), (scaled, _) = mixed(), mixed()
    for each in (model, scaled):
        tt.reparametrize_(each)
    autocast_run(model, x, torch.amp.GradScaler("cpu", enabled=False))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    autocast_run(scaled, x, scaler)
    assert scaler.get_scale() == 2.0**10  # no step was skipped
    torch.testing.assert_close(scaled.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_scaler_that_starts_too_high_skips_steps_and_then_trains(mixed: MakeMixed) -> None:
    model, x = mixed()
    tt.reparametrize_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    losses, moved, skipped = [], [], []
    for _ in range(60):
        before, scale = model.head.sigma_u.clone(), scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = (model(x).float() - 0.1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
        moved.append(not torch.equal(model.head.sigma_u, before))
        skipped.append(scaler.get_scale() < scale)
    assert skipped[0]
    assert not skipped[-1]
    assert [not s for s in skipped] == moved
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_and_gamma_stay_float32_when_the_model_is_cast(mixed: MakeMixed, cast: torch.dtype) -> None:
    model, _ = mixed()
    tt.reparametrize_(model)
    model.head(torch.randn(1, 16)).sum().backward()
    model.to(cast)
    assert model.head.weight.dtype == cast
    for tensor in (model.head.gamma, model.head.gamma.grad, model.head.sigma_u, model.attention.in_proj_sigma_v):
        assert tensor.dtype == torch.float32
    assert model.head(torch.randn(1, 16, dtype=cast)).dtype == cast
    model.double()
    assert model.head.gamma.dtype == model.head.sigma_u.dtype == torch.float64


def test_autocast_around_our_calls_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    expected = tt.effective_weight(tt.reparametrize_(copy.deepcopy(plain)))
    x = torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        layer = tt.reparametrize_(copy.deepcopy(plain))
        assert layer.gamma.dtype == torch.float32
        assert torch.equal(tt.effective_weight(layer), expected)
        loss = layer(x).float().square().mean()
    grads = [torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)]
    with torch.autocast("cpu", torch.bfloat16):
        grads.append(torch.autograd.grad(loss, list(layer.parameters())))
        tt.fold_(layer)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=0)
