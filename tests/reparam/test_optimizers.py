"""Optimisers of all kinds: the vectors move once for every step of the one that holds the weight."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt


def small_net(vectors: int = 4, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    return tt.reparametrize_(net, tt.SigmaReparam(vectors=vectors))


def loss_of(net: nn.Module, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    loss: Tensor = (net(x) - 0.3 * x[:, :3]).square().mean()
    return loss


def vectors(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def assert_moved_once(net: nn.Module, before: dict[str, Tensor], only: str = "") -> None:
    """Compare with a copy that has the weights of now, the vectors of before, and is refreshed once by hand."""
    twin = copy.deepcopy(net)
    twin.load_state_dict(before, strict=False)
    tt.refresh_(twin)
    for name, expected in twin.named_buffers():
        moves = name.startswith(only)
        torch.testing.assert_close(net.get_buffer(name), expected if moves else before[name], rtol=1e-10, atol=1e-12)
        assert torch.equal(net.get_buffer(name), before[name]) != moves, name


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fused-adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach-adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("count", [1, 4])
def test_every_step_moves_them_once(make: Callable[..., torch.optim.Optimizer], count: int) -> None:
    net = small_net(count)
    optimizer = make(net.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    for _ in range(3):
        before = vectors(net)
        optimizer.step(closure)
        assert_moved_once(net, before)


def test_only_the_optimisers_own_weights_move() -> None:
    net = small_net()
    optimizer = torch.optim.SGD([*net[0].parameters()], lr=0.1)
    before = vectors(net)
    loss_of(net).backward()
    optimizer.step()
    assert_moved_once(net, before, only="0.")


def test_shared_layers_move_once() -> None:
    shared = nn.Linear(4, 4).double()
    net = tt.reparametrize_(nn.Sequential(shared, nn.Tanh(), shared))
    before = vectors(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    net(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert_moved_once(net, before)


def test_a_skipped_step_of_a_grad_scaler_moves_nothing() -> None:
    net = small_net(dtype=torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = vectors(net)
    scaler.scale(loss_of(net, dtype=torch.float32) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    for name, buffer in vectors(net).items():
        assert torch.equal(buffer, before[name])


def matrices(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.ndim == 2]


def others(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.ndim != 2]


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@needs_muon
@pytest.mark.parametrize("count", [1, 4])
def test_muon_for_the_weights_beside_adamw_for_the_rest(count: int) -> None:
    net = small_net(count)
    muon, adamw = torch.optim.Muon(matrices(net), lr=0.02, weight_decay=0.0), torch.optim.AdamW(others(net), lr=1e-2)
    losses = []
    for _ in range(40):
        before = vectors(net)
        muon.zero_grad()
        adamw.zero_grad()
        loss = loss_of(net)
        losses.append(float(loss.detach()))
        loss.backward()
        adamw.step()
        for name, buffer in vectors(net).items():
            assert torch.equal(buffer, before[name])
        muon.step()
        assert_moved_once(net, before)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("clear_at_once", [True, False])
def test_one_optimiser_for_the_weights_and_one_for_the_gammas(weights_first: bool, clear_at_once: bool) -> None:
    net, reference = small_net(), small_net()
    optimizers = [torch.optim.SGD(matrices(net), lr=0.1), torch.optim.SGD(others(net), lr=0.1)]
    together = torch.optim.SGD(reference.parameters(), lr=0.1)
    for seed in range(3):
        before = vectors(net)
        loss_of(net, seed).backward()
        for optimizer in optimizers if weights_first else reversed(optimizers):
            optimizer.step()
            if clear_at_once:
                optimizer.zero_grad()
        assert_moved_once(net, before)
        net.zero_grad()
        loss_of(reference, seed).backward()
        together.step()
        together.zero_grad()
    torch.testing.assert_close(net.state_dict(), reference.state_dict())


def test_one_optimiser_for_each_parameter_that_steps_inside_backward() -> None:
    """Gradients are freed as soon as they are used, so that they never exist all at once."""
    net, reference = small_net(), small_net()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    together = torch.optim.SGD(reference.parameters(), lr=0.1)
    for seed in range(3):
        before = vectors(net)
        loss_of(net, seed).backward()
        assert_moved_once(net, before)
        loss_of(reference, seed).backward()
        together.step()
        together.zero_grad()
    torch.testing.assert_close(net.state_dict(), reference.state_dict())


class OfOnesOwn(torch.optim.Optimizer):
    """Gradient descent, written by a user; it can be made to fail."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})
        self.fail = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.fail:
            raise ArithmeticError("the step went wrong")
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(0.1 * parameter.grad)


def test_a_step_that_raises_moves_nothing_and_the_next_one_does() -> None:
    net = small_net()
    optimizer = OfOnesOwn(net.parameters())
    optimizer.fail = True
    loss_of(net).backward()
    before = vectors(net)
    with pytest.raises(ArithmeticError, match="went wrong"):
        optimizer.step()
    for name, buffer in vectors(net).items():
        assert torch.equal(buffer, before[name])
    optimizer.fail = False
    optimizer.step()
    assert_moved_once(net, before)


def test_an_optimiser_made_before_conversion_follows_and_takes_the_gammas_as_a_group() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loss_of(net).backward()
    optimizer.step()
    tt.reparametrize_(net)
    for with_gammas in (False, True):
        gammas = [net[i].gamma for i in (0, 2, 4)]
        if with_gammas:
            optimizer.add_param_group({"params": gammas, "weight_decay": 0.0})
        before, gammas_before = vectors(net), [gamma.detach().clone() for gamma in gammas]
        net.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        assert_moved_once(net, before)
        for gamma, old in zip(gammas, gammas_before, strict=True):
            assert torch.equal(gamma, old) != with_gammas


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_gradients_are_accumulated_at_one_sigma_and_the_vectors_move_once(micro_batches: int) -> None:
    net, whole = small_net(), small_net()
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = vectors(net)
    for part in x.chunk(micro_batches):
        (net(part).square().mean() / micro_batches).backward()
    whole(x).square().mean().backward()
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.optim.AdamW(net.parameters(), lr=1e-2).step()
    assert_moved_once(net, before)


def test_two_models_in_one_optimiser_and_one_model_in_two() -> None:
    first, second = small_net(), small_net()
    both = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    half = torch.optim.SGD(first[0].parameters(), lr=0.1)
    (loss_of(first) + loss_of(second)).backward()
    before = vectors(first), vectors(second)
    both.step()
    assert_moved_once(first, before[0])
    assert_moved_once(second, before[1])
    before = vectors(first), vectors(second)
    half.step()
    assert_moved_once(first, before[0], only="0.")
    for name, buffer in vectors(second).items():
        assert torch.equal(buffer, before[1][name])
