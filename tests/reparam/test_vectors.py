"""D1: the vectors move once per weight update and never otherwise; sigma is always that of the weight in use."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trimtab as tt


def small_net(vectors: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return tt.reparametrize_(net, tt.SigmaReparam(vectors=vectors))


def batch() -> Tensor:
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def vectors(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def assert_still(net: nn.Module, before: dict[str, Tensor]) -> None:
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name


def iterated_once(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    v = weight @ u
    v = v / v.norm()
    u = weight.t() @ v
    return u / u.norm(), v


def assert_moved_once(net: nn.Sequential, before: dict[str, Tensor]) -> None:
    for name, layer in net.named_children():
        if isinstance(layer, nn.Linear):
            u, v = iterated_once(layer.weight.detach(), before[f"{name}.sigma_u"][0, 0])
            assert not torch.equal(layer.sigma_u, before[f"{name}.sigma_u"])
            torch.testing.assert_close(layer.sigma_u[0, 0], u)
            torch.testing.assert_close(layer.sigma_v, v)


def read_weight(net: nn.Sequential) -> None:
    for layer in net[::2]:
        layer.weight.norm()
        tt.effective_weight(layer)
    net.state_dict()
    tt.describe(net)
    tt.sigma_error(net)


def run_eval(net: nn.Sequential) -> None:
    net.eval()
    with torch.no_grad():
        net(batch())
    net.train()


def run_twice_with_backward(net: nn.Sequential) -> None:
    for _ in range(2):
        net(batch()).square().mean().backward()


def recompute(net: nn.Sequential, reentrant: bool) -> None:
    x = batch().requires_grad_()
    checkpoint(net, x, use_reentrant=reentrant).square().mean().backward()


@pytest.mark.parametrize(
    "act",
    [
        read_weight,
        run_eval,
        run_twice_with_backward,
        lambda net: recompute(net, reentrant=False),
        lambda net: recompute(net, reentrant=True),
        copy.deepcopy,
    ],
    ids=["reading", "eval", "same-batch-twice", "recompute", "recompute-reentrant", "deepcopy"],
)
@pytest.mark.parametrize("count", [1, 4])
def test_vectors_stand_still(act: Callable[[nn.Sequential], Any], count: int) -> None:
    net = small_net(count)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(batch()).square().mean().backward()
    optimizer.step()
    before = vectors(net)
    act(net)
    assert_still(net, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_gives_the_gradients_of_the_plain_run(mixed: Callable[..., Any], reentrant: bool) -> None:
    (plain, x), (recomputed, _) = mixed(torch.float64), mixed(torch.float64)
    optimizers = [torch.optim.SGD(tt.reparametrize_(net).parameters(), lr=0.1) for net in (plain, recomputed)]
    for _ in range(3):
        before = vectors(recomputed)
        plain(x).square().mean().backward()
        checkpoint(recomputed, x.requires_grad_(), use_reentrant=reentrant).square().mean().backward()
        assert_still(recomputed, before)
        for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(recomputed.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_sigma_follows_perturbed_weights() -> None:
    net = small_net()
    layer = net[0]
    with torch.no_grad():
        layer.weight.add_(0.1)
    sigma = layer.sigma_v @ layer.weight @ layer.sigma_u[0, 0]
    torch.testing.assert_close(tt.effective_weight(layer), layer.gamma * layer.weight / sigma)
    x = batch().requires_grad_()
    torch.testing.assert_close(layer(x), x @ tt.effective_weight(layer).t() + layer.bias)


def test_gradients_at_perturbed_weights_in_functional_call() -> None:
    layer = small_net()[0]
    x = batch()[:3]

    def function(weight: Tensor, gamma: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "gamma": gamma}, (x,))

    weight = (layer.weight.detach() * 1.3 + 0.05).requires_grad_()
    gamma = layer.gamma.detach().mul(0.7).requires_grad_()
    assert torch.autograd.gradcheck(function, (weight, gamma))
    assert torch.autograd.gradgradcheck(function, (weight, gamma))
    sigma = layer.sigma_v @ weight @ layer.sigma_u[0, 0]
    torch.testing.assert_close(function(weight, gamma), x @ (gamma * weight / sigma).t() + layer.bias)


def test_an_averaged_copy_lives_on_its_own() -> None:
    net = small_net()
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        net(batch()).square().mean().backward()
        optimizer.step()
        average.update_parameters(net)
    assert_still(average.module, vectors(net))  # torch's averaging copies buffers, so the vectors follow
    tt.refresh_(average.module, exact=True)
    for layer in average.module[::2]:
        exact = torch.linalg.matrix_norm(layer.weight, 2)
        torch.testing.assert_close(tt.effective_weight(layer), layer.gamma * layer.weight / exact)
        weight = layer.weight.detach().clone().requires_grad_()
        x = torch.randn(2, layer.in_features, dtype=torch.float64)

        def function(weight: Tensor, layer: nn.Module = layer, x: Tensor = x) -> Tensor:
            return torch.func.functional_call(layer, {"weight": weight}, (x,))

        assert torch.autograd.gradcheck(function, (weight,))
        assert torch.autograd.gradgradcheck(function, (weight,))


def test_a_deepcopy_trains_on_its_own() -> None:
    net = small_net()
    twin = copy.deepcopy(net)
    before_net, before_twin = vectors(net), vectors(twin)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    twin(batch()).square().mean().backward()
    optimizer.step()
    assert_still(net, before_net)
    assert_moved_once(twin, before_twin)


def test_refresh_is_one_iteration_or_exact() -> None:
    net = small_net()
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.add_(torch.randn(layer.weight.shape, dtype=torch.float64))
    before = vectors(net)
    tt.refresh_(net)
    assert_moved_once(net, before)
    tt.refresh_(net, exact=True)
    for layer in net[::2]:
        sigma = layer.sigma_v @ layer.weight @ layer.sigma_u[0, 0]
        torch.testing.assert_close(sigma, torch.linalg.matrix_norm(layer.weight, 2))


def test_refresh_refuses_what_it_cannot_do() -> None:
    with pytest.raises(tt.ConversionError, match="nothing to refresh"):
        tt.refresh_(nn.Linear(2, 2))
    net = small_net()
    with torch.no_grad():
        net[2].weight.fill_(float("nan"))
    before = vectors(net)
    with pytest.raises(tt.ConversionError, match=r"2\.weight.*NaN"):
        tt.refresh_(net, exact=True)
    assert_still(net, before)
    tt.refresh_(net)  # one iteration: the broken weight keeps its vectors
    assert torch.equal(net[2].sigma_u, before["2.sigma_u"])


def test_buffers_may_be_written_between_forward_and_backward() -> None:
    """Data-parallel wrappers broadcast buffers in place at every forward; the gradient stays that of this forward."""
    layer = small_net()[0]
    expected = torch.autograd.grad(layer(batch()).square().sum(), layer.weight)
    loss = layer(batch()).square().sum()
    with torch.no_grad():
        layer.sigma_u.zero_()
        layer.sigma_v.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, layer.weight), expected)
