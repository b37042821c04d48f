"""Where SAM and ASAM climb to, and the step they take from there: closed form, transcription, another library."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sam_models import closure_of, loss_of, net
from torch import Tensor, nn

import trimtab as tt


def test_closed_form_on_a_quadratic() -> None:
    """L = sum of a w² / 2: the gradient is a w, and that of the point that SAM looks at a (w + rho a w / |a w|)."""
    a = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = tt.SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (a * w.square()).sum() / 2
        loss.backward()
        return loss

    for _ in range(5):
        at = w.detach().clone()
        slope = a * at
        expected = at - 0.1 * a * (at + 0.5 * slope / slope.norm())
        assert optimizer.step(closure).item() == pytest.approx((a * at.square()).sum().item() / 2, rel=1e-14)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-14, atol=1e-14)


def by_the_definition(model: nn.Module, steps: int, lr: float, rho: float, eta: float | None) -> None:
    """Algorithm 1 of both papers, one parameter after the other, with plain gradient descent."""
    parameters = list(model.parameters())
    for seed in range(steps):
        gradients = torch.autograd.grad(loss_of(model, seed), parameters)
        before = [p.detach().clone() for p in parameters]
        stretches = [torch.ones_like(w) if eta is None else w.abs() + eta for w in before]
        length = sum((t * g).square().sum() for t, g in zip(stretches, gradients, strict=True)).sqrt()
        with torch.no_grad():
            for p, t, g in zip(parameters, stretches, gradients, strict=True):
                p += rho * t * t * g / length
        there = torch.autograd.grad(loss_of(model, seed), parameters)
        with torch.no_grad():
            for p, w, g in zip(parameters, before, there, strict=True):
                p.copy_(w - lr * g)


@given(rho=st.floats(0.001, 2.0), eta=st.none() | st.floats(0.0, 1.0))
def test_transcription_of_the_definition(rho: float, eta: float | None) -> None:
    ours, reference = net(), net()
    kind: Any = tt.SAM if eta is None else tt.ASAM
    optimizer = kind(ours.parameters(), torch.optim.SGD, rho, lr=0.3, **({} if eta is None else {"eta": eta}))
    for seed in range(3):
        optimizer.step(closure_of(optimizer, ours, seed))
    by_the_definition(reference, 3, 0.3, rho, eta)
    torch.testing.assert_close(ours.state_dict(), reference.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_the_sam_of_pytorch_optimizer(base: type, adaptive: bool) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    ours, theirs = net(), net()
    options = {"lr": 0.05, "weight_decay": 0.1}
    reference = library.SAM(theirs.parameters(), base, rho=0.3, adaptive=adaptive, **options)
    kind: Any = (lambda *a, **k: tt.ASAM(*a, eta=0.0, **k)) if adaptive else tt.SAM
    optimizer = kind(ours.parameters(), base, 0.3, **options)
    for seed in range(8):
        optimizer.step(closure_of(optimizer, ours, seed))
        closure = closure_of(reference, theirs, seed)
        with torch.enable_grad():
            closure()
        reference.step(closure)
    # Its norm is a float32 number, so the radius differs by 6e-8, and Adam's first steps enlarge that.
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-7)


def test_groups_have_their_own_rho_and_one_norm() -> None:
    model = net()
    first, second = model[0], model[2]
    groups = [{"params": first.parameters(), "rho": 0.2}, {"params": second.parameters()}]
    optimizer = tt.SAM(groups, torch.optim.SGD, rho=0.5, lr=0.0)
    third = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [third], "rho": 0})
    before = copy.deepcopy(model)
    (loss_of(model) + third.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    length = torch.stack([*(g.norm() for g in gradients.values()), third.grad.norm()]).norm()
    optimizer.first_step()
    for name, p in model.named_parameters():
        rho = 0.2 if name.startswith("0") else 0.5
        torch.testing.assert_close(p - before.get_parameter(name), rho * gradients[name] / length)
    assert torch.equal(third, torch.ones(2, dtype=torch.float64))  # rho 0 stays, its gradient counts
    assert [group["rho"] for group in optimizer.base_optimizer.param_groups] == [0.2, 0.5, 0]


def test_a_group_of_asam_without_eta_climbs_as_sams() -> None:
    w, b = (nn.Parameter(torch.tensor(values, dtype=torch.float64)) for values in ([2.0, -1.0], [3.0]))
    optimizer = tt.ASAM([{"params": [w]}, {"params": [b], "eta": None}], torch.optim.SGD, rho=0.1, lr=1.0)
    (w.sum() + 2 * b.sum()).backward()
    optimizer.first_step()
    length = (2.01**2 + 1.01**2 + 4) ** 0.5
    torch.testing.assert_close(
        w.detach(), torch.tensor([2 + 0.1 * 2.01**2 / length, -1 + 0.1 * 1.01**2 / length]).double()
    )
    torch.testing.assert_close(b.detach(), torch.tensor([3 + 0.1 * 2 / length]).double())


@pytest.mark.parametrize("kind", [tt.SAM, tt.ASAM])
def test_sparse_gradients_climb_as_dense_ones(kind: Any) -> None:
    words = torch.tensor([[1, 4, 4], [6, 1, 1]])
    models = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleDict({"words": nn.Embedding(9, 4, sparse=sparse), "head": nn.Linear(4, 9)}).double()
        optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.4, lr=0.5)
        before = copy.deepcopy(model.state_dict())

        def loss(model: nn.Module = model) -> Tensor:
            return F.cross_entropy(model["head"](model["words"](words)).flatten(0, 1), words.flip(1).flatten())

        for _ in range(3):
            loss().backward()
            assert model["words"].weight.grad.is_sparse == sparse
            optimizer.first_step()
            moved = (model["words"].weight != before["words.weight"]).any(1)
            assert moved[[1, 4, 6]].all()
            assert moved.sum() == 3
            loss().backward()
            optimizer.second_step()
            optimizer.zero_grad()
        models.append(model)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-12, atol=1e-12)


def test_parameters_without_a_gradient_stay_and_no_gradient_at_all_skips() -> None:
    model = net()
    model[2].requires_grad_(False)
    spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = tt.SAM([*model.parameters(), spare], torch.optim.AdamW, rho=0.5, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    optimizer.step(closure_of(optimizer, model))
    assert not torch.equal(model[0].weight, before["0.weight"])
    for tensor, kept in ((model[2].weight, before["2.weight"]), (spare, torch.ones(3))):
        assert torch.equal(tensor, kept.to(tensor))
    optimizer.zero_grad()
    optimizer.first_step()
    optimizer.second_step()
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_weights_are_put_back_to_the_bit_in_the_same_memory(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((300, 7), (), (0, 3), (5,))]
    optimizer = tt.SAM(weights, torch.optim.SGD, rho=0.3, lr=0.0)
    before = [(w.detach().clone(), w.data_ptr()) for w in weights]

    def loss() -> Tensor:
        return sum(w.abs().square().sum() for w in weights)

    loss().backward()
    optimizer.first_step()
    assert optimizer.perturbed
    moves = [(w - kept).detach().abs().float().norm() for w, (kept, _) in zip(weights, before, strict=True)]
    assert torch.stack(moves).norm().item() == pytest.approx(0.3, rel=0.05)  # bfloat16 has 8 bits
    loss().backward()
    gradients = [w.grad for w in weights]
    optimizer.second_step()
    assert not optimizer.perturbed
    for w, g, (kept, address) in zip(weights, gradients, before, strict=True):
        assert torch.equal(w, kept)
        assert w.data_ptr() == address
        assert w.grad is g
