"""Refreshing all weights at once is refreshing each by itself; what no optimiser holds stays as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import refresh, sigma_gamma
from trimtab.reparam.layers import Reparametrized


class Zoo(nn.Module):
    """Weights of equal and of different shapes, cut into equal and unequal blocks, of several dtypes and layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.ModuleList(nn.Linear(12, 8) for _ in range(3))
        self.even = nn.Linear(12, 16)  # two blocks of the same shape as those above
        self.uneven = nn.Linear(12, 15)
        self.narrow = nn.Linear(3, 9)
        self.row = nn.Linear(7, 1)
        self.conv = nn.Conv2d(3, 8, 2)  # 8 x 12 too, seen as a matrix
        self.attention = nn.MultiheadAttention(12, 3)
        self.large = nn.Linear(300, 260)  # not copied beside others
        self.half = nn.ModuleList(nn.Linear(12, 8, dtype=dtype) for dtype in (torch.bfloat16, torch.float16))
        self.double = nn.Linear(12, 8, dtype=torch.float64)
        self.other_layout = nn.Linear(8, 12)
        self.other_layout.weight = nn.Parameter(torch.randn(12, 8).t().contiguous().t())
        self.embed = nn.Embedding(8, 12)


def blocks(module: nn.Module, name: str) -> Any:
    return {"even": 2, "uneven": (8, 4, 3)}.get(name)


def turned(vectors: int) -> Zoo:
    """Return a converted zoo whose weights have moved since its vectors were exact."""
    torch.manual_seed(0)
    zoo = tt.reparametrize_(Zoo(), tt.SigmaReparam(vectors=vectors, blocks=blocks, embeddings=True))
    with torch.no_grad():
        for parameter in zoo.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.3)
    return zoo


def carried_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "sigma" in name}


@pytest.mark.parametrize("vectors", [1, 2, 4])
@pytest.mark.parametrize("stacked_below", [0, None, 2**40], ids=["nothing-stacked", "as-it-is", "everything-stacked"])
def test_all_at_once_is_each_by_itself(
    vectors: int, stacked_below: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = turned(vectors), turned(vectors)
    before = carried_tensors(together)
    if stacked_below is not None:
        monkeypatch.setattr(refresh, "_STACK_BELOW", {"cpu": stacked_below})
    tt.refresh_(together)
    for module in alone.modules():
        if isinstance(module, Reparametrized):
            for weight_name in module._carried_sizes:
                refresh.refresh_vectors_([module.carried(weight_name)])
    after, expected = carried_tensors(together), carried_tensors(alone)
    assert all(not torch.equal(after[name], before[name]) for name in after if "row" not in name)
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(sigma_gamma(together), sigma_gamma(alone))


@pytest.mark.parametrize("vectors", [1, 4])
def test_autocast_and_grad_mode_around_it_change_nothing(vectors: int) -> None:
    plain, cast = turned(vectors), turned(vectors)
    tt.refresh_(plain)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        tt.refresh_(cast)
    torch.testing.assert_close(carried_tensors(cast), carried_tensors(plain), rtol=0, atol=0)
    assert not any(buffer.requires_grad for buffer in cast.buffers())


@pytest.fixture
def refreshed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Ids of the weights that each refresh worked on."""
    calls: list[list[int]] = []
    work: Callable[[list[Any]], None] = refresh._refresh_stacks_

    def watched(stacks: list[Any]) -> None:
        calls.append([stack.blocks.data_ptr() for stack in stacks])
        work(stacks)

    monkeypatch.setattr(refresh, "_refresh_stacks_", watched)
    return calls


def step(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


def three_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return tt.reparametrize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)))


def test_weights_that_no_optimiser_holds_cost_nothing(refreshed: list[list[int]]) -> None:
    model = three_layers()
    model[0].requires_grad_(False)
    before = carried_tensors(model)
    step(model, [p for p in model[:2].parameters() if p.requires_grad])
    after = carried_tensors(model)
    assert refreshed == [[model[1].weight.data_ptr()]]
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"1.sigma_u", "1.sigma_v"}


def test_an_optimiser_without_matrices_does_no_work(refreshed: list[list[int]]) -> None:
    model = three_layers()
    step(model, [layer.gamma for layer in model])
    assert refreshed == []


@pytest.mark.parametrize("untied", [False, True], ids=["shared-vectors", "vectors-of-their-own"])
def test_a_weight_in_two_places_is_worked_on_once_and_both_agree(refreshed: list[list[int]], untied: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    tt.reparametrize_(model)
    if untied:
        model.double().float()  # torch casts buffers module by module
    assert (model[2].sigma_u is not model[0].sigma_u) == untied
    before = carried_tensors(model)
    step(model, list(model.parameters()))
    assert [sorted(call) for call in refreshed] == [sorted(model[i].weight.data_ptr() for i in (0, 1))]
    assert not torch.equal(model[0].sigma_u, before["0.sigma_u"])
    assert torch.equal(model[0].sigma_u, model[2].sigma_u)
    assert torch.equal(model[0].sigma_v, model[2].sigma_v)


def test_nothing_in_it_waits_for_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a number off a tensor would stop a GPU's queue, and end a CUDA graph's capture."""
    zoo = turned(4)
    for method in ("item", "__bool__", "__float__", "__int__", "tolist", "nonzero"):

        def refuse(*_: Any, name: str = method) -> Any:
            raise AssertionError(f"a refresh calls Tensor.{name}")

        monkeypatch.setattr(Tensor, method, refuse)
    tt.refresh_(zoo)


@pytest.mark.parametrize("use", ["effective_weight", "attention"])
def test_the_vectors_may_move_between_forward_and_backward(use: str) -> None:
    torch.manual_seed(0)
    if use == "attention":  # one sigma over all three projections, with different inputs
        model = tt.reparametrize_(nn.MultiheadAttention(8, 2).double(), tt.SigmaReparam(blocks="one"))
        q, k = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(4, 3, 8, dtype=torch.float64)
        weight, output = model.in_proj_weight, lambda: model(q, k, k)[0].square().sum()
    else:
        model = tt.reparametrize_(nn.Linear(5, 4).double())
        weight, output = model.weight, lambda: tt.effective_weight(model).square().sum()
    expected = torch.autograd.grad(output(), weight)
    kept = output()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.mul_(0.5)
    torch.testing.assert_close(torch.autograd.grad(kept, weight), expected)


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e20, 1e35])
@pytest.mark.parametrize("vectors", [1, 4])
def test_weights_of_any_scale_are_followed(scale: float, vectors: int) -> None:
    torch.manual_seed(0)
    layer = tt.reparametrize_(nn.Linear(8, 6), tt.SigmaReparam(vectors=vectors))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, 8) * scale)
    for _ in range(100):
        tt.refresh_(layer)
    assert float(tt.sigma_error(layer)["weight"]) == pytest.approx(0, abs=1e-4)
