import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.watch.signals.gradients import gradient_noise
from trimtab.watch.taps.gradients import GradientTap, MicroBatches, noise_of


class Net(nn.Module):
    """A tied, sparsely used table; layers of its own, one of them shared; recomputed if asked."""

    def __init__(self, mode: str = "plain") -> None:
        super().__init__()
        self.words, self.shared = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.words.weight
        self.mode = mode

    def layer(self, x: Tensor) -> Tensor:
        return torch.tanh(self.shared(x))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for _ in range(2):
            x = self.layer(x) if self.mode == "plain" else checkpoint(self.layer, x, use_reentrant=self.mode == "twice")
        return self.head(x).logsumexp(-1).mean()


@pytest.fixture
def tap():
    taps = []

    def make(model, wanted=lambda: True):
        taps.append(GradientTap(model, wanted))
        return taps[-1]

    yield make
    for each in taps:
        each.close()


def batches(count: int) -> list[Tensor]:
    return list(torch.randint(7, (count, 3, 5), generator=torch.Generator().manual_seed(1)))


def gradient_of(model: nn.Module, tokens: Tensor) -> Tensor:
    gradients = torch.autograd.grad(model(tokens), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def accumulate(model: nn.Module, parts: list[Tensor], divide: bool) -> None:
    for tokens in parts:
        (model(tokens) / (len(parts) if divide else 1)).backward()


@pytest.mark.parametrize("mode", ["plain", "recomputed"])
@pytest.mark.parametrize("divide", [True, False])
def test_noise_of_micro_batches_in_the_units_of_the_optimizers_gradient(tap, mode, divide) -> None:
    torch.manual_seed(0)
    model, parts = Net(mode), batches(4)
    each = torch.stack([gradient_of(model, tokens) for tokens in parts]) * (1 if divide else len(parts))
    seen = tap(model)
    for _ in range(2):  # the second step sees nothing of the first
        model.zero_grad()
        accumulate(model, parts, divide)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        found = seen.take()
    noise = noise_of([found])
    assert noise.variance == pytest.approx(each.var(0, correction=1).sum().item(), rel=1e-4)
    expected = gradient_noise(each.square().sum(1).mean().item(), each.mean(0).square().sum().item(), 4)
    assert noise.signal == pytest.approx(expected.signal, rel=1e-3, abs=1e-4 * noise.variance)


def test_what_cannot_be_told_is_absent(tap) -> None:
    """One part; no backward; gradients in pieces; gradients that are not accumulated."""
    torch.manual_seed(0)
    model, (one, two) = Net(), batches(2)
    seen = tap(model)
    model(one).backward()
    assert noise_of([seen.take()]) is None
    model(one)
    assert seen.take() is None
    torch.autograd.grad(model(one), model.shared.weight)
    assert seen.take() is None
    model.mode = "twice"  # reentrant: the shared layer's gradient comes in two pieces a backward
    accumulate(model, [one, two], True)
    assert seen.take() is None


def test_a_hook_that_fails_does_not_stop_the_backward(tap, monkeypatch) -> None:
    model = Net()
    seen = tap(model)
    monkeypatch.setattr("trimtab.watch.taps.gradients._square", lambda _: 1 / 0)
    accumulate(model, batches(2), True)
    assert seen.take() is None
    assert model.shared.weight.grad is not None
    monkeypatch.undo()
    accumulate(model, batches(2), True)
    assert seen.take() is not None


def test_nothing_changes_and_nothing_stays(tap) -> None:
    def run(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, wanted = Net(), [True]
        seen = tap(model, lambda: wanted[0]) if watched else None
        found = []
        for step in range(3):
            accumulate(model, batches(2), True)
            if seen is not None:
                assert bool(model.shared.weight._backward_hooks) == wanted[0]
                assert (seen.take() is not None) == wanted[0]
                assert not model.shared.weight._backward_hooks
                wanted[0] = step == 1
            found += [parameter.grad.clone() for parameter in model.parameters()]
        return [*found, torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_processes_that_share_their_gradient_and_others() -> None:
    """Two processes of two parts each, by hand; averaging gradients, or training apart."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 9, dtype=torch.float64)  # processes, parts: what each backward adds, losses divided by 2
    own = [(2, one.square().sum().item()) for one in x]
    mean = x.sum(1).mean(0).square().sum().item()
    together = noise_of([MicroBatches(*each, mean) for each in own])
    y = 2 * x.flatten(0, 1)  # the four parts whose mean that gradient is
    assert together.variance == pytest.approx(y.var(0, correction=1).sum().item())
    apart = noise_of([MicroBatches(*each, one.sum(0).square().sum().item()) for each, one in zip(own, x, strict=True)])
    expected = (2 * x).var(1, correction=1).sum(1).mean().item()
    assert apart.variance == pytest.approx(expected)
    assert noise_of([]) is None
    assert noise_of([MicroBatches(1, 2.0, 3.0), MicroBatches(2, 2.0, 3.0)]) is None
    assert noise_of([MicroBatches(1, 2.0, 3.0), MicroBatches(1, 2.0, 4.0)]) is None


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")  # torch.compile's own
@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_compiled_models_are_seen_and_not_compiled_again(tap, how) -> None:
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    parts, compiled = list(torch.randn(2, 3, 5)), []

    def backend(graph, _):
        compiled.append(1)
        return graph.forward

    called = torch.compile(model, backend=backend) if how == "wrapped" else model
    if how == "in place":
        model.compile(backend=backend)
    wanted = [False]
    seen = tap(model, lambda: wanted[0])
    for wanted[0] in (False, True, False, True):
        model.zero_grad()
        for part in parts:
            called(part).square().mean().backward()
        found = seen.take()
        assert (found is not None) == wanted[0]
    assert len(compiled) == 1
    noise = noise_of([found])
    each = []
    for part in parts:
        gradients = torch.autograd.grad(2 * model.forward(part).square().mean(), list(model.parameters()))
        each.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert noise.variance == pytest.approx(torch.stack(each).var(0).sum().item(), rel=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_zeroed_between_backwards_are_no_micro_batches(tap, set_to_none) -> None:
    """SAM and closures take the gradient of one batch twice: there is no noise to tell."""
    torch.manual_seed(0)
    model, (tokens, other) = Net(), batches(2)
    seen = tap(model)
    model(tokens).backward()
    model.zero_grad(set_to_none=set_to_none)
    model(tokens).backward()
    assert seen.take() is None
    model.zero_grad(set_to_none=set_to_none)  # before the first backward: as every loop does
    accumulate(model, [tokens, other], divide=True)
    assert seen.take().parts == 2


def test_parameters_that_are_no_leaves_or_not_there_yet_stop_nothing(tap) -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
    seen = tap(lazy)
    lazy(torch.randn(3, 5)).sum().backward()
    assert seen.take() is None
    model = nn.Linear(5, 1)
    shift = nn.Parameter(torch.zeros(1, 5))
    seen = tap(model)
    changed = {"weight": model.weight + shift, "bias": model.bias}
    torch.func.functional_call(model, changed, torch.randn(3, 5)).sum().backward()
    assert seen.take() is None
    assert shift.grad is not None
