"""Terms recorded in a forward: read once, differentiable, and part of no copy."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.stabilizers import auxiliary_loss
from trimtab.stabilizers.auxiliary import record


def record_square(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """A forward hook that asks for small outputs."""
    if module.training:
        record(module, output.square().mean())


class Net(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.recompute = recompute
        for layer in (self.first, self.second):
            layer.register_forward_hook(record_square)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.first, x, use_reentrant=False) if self.recompute else self.first(x)
        return self.second(torch.tanh(hidden))


def net(recompute: bool = False) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(recompute).double(), torch.randn(5, 4, dtype=torch.float64)


def reference(model: Net, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The sum of both terms and its gradients, by hand."""
    hidden = torch.nn.functional.linear(x, model.first.weight, model.first.bias)
    output = torch.nn.functional.linear(torch.tanh(hidden), model.second.weight, model.second.bias)
    total = hidden.square().mean() + output.square().mean()
    return total.detach(), list(torch.autograd.grad(total, list(model.parameters())))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_sum_of_a_forward_with_its_gradient_and_once(recompute: bool) -> None:
    model, x = net(recompute)
    expected, gradients = reference(model, x)
    for _ in range(2):  # as for the micro-batches of a step
        model.zero_grad()
        output = model(x)
        total = auxiliary_loss(model)
        assert total is not None
        torch.testing.assert_close(total.detach(), expected)
        (total + 0 * output.sum()).backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
        assert auxiliary_loss(model) is None  # also when the backward has run a forward once more


def test_a_forward_nobody_read_is_replaced_and_evaluation_records_nothing() -> None:
    model, x = net()
    model(x + 1)
    model(x)
    total = auxiliary_loss(model)
    assert total is not None
    torch.testing.assert_close(total.detach(), reference(model, x)[0])
    model.eval()(x)
    assert auxiliary_loss(model) is None


def test_a_model_with_an_unread_term_can_be_copied_and_pickled() -> None:
    model, x = net()
    model(x)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert auxiliary_loss(twin) is None
    assert auxiliary_loss(torch.load(buffer, weights_only=False)) is None
    assert auxiliary_loss(model) is not None


def test_compiled() -> None:
    model, x = net()
    expected, gradients = reference(model, x)
    torch._dynamo.reset()
    program = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        output = program(x)
        total = auxiliary_loss(program)
        assert total is not None
        torch.testing.assert_close(total.detach(), expected)
        (total + 0 * output.sum()).backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
        assert auxiliary_loss(model) is None
