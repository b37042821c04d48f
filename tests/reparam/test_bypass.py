"""A module that reads its child's weight past the child's forward is found out at the first step."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt


class Reader(nn.Module):
    def __init__(self, past_the_layer: bool) -> None:
        super().__init__()
        self.layer, self.past_the_layer = nn.Linear(3, 2), past_the_layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight) if self.past_the_layer else self.layer(x)


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_a_weight_read_past_its_layer_is_told_once() -> None:
    model = tt.reparametrize_(Reader(past_the_layer=True))
    with pytest.warns(UserWarning, match=r"Linear \(2, 3\): its weight got a gradient but its gamma none.*filter_fn"):
        step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model)


@pytest.mark.parametrize("frozen", [None, "gamma", "weight"])
def test_a_weight_used_through_its_layer_is_not(frozen: str | None) -> None:
    model = tt.reparametrize_(Reader(past_the_layer=False))
    if frozen:
        model.layer.get_parameter(frozen).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model)


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_gammas_that_no_optimiser_holds_are_told_once() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tt.reparametrize_(model)
    with pytest.warns(UserWarning, match=r"Linear: its weight has taken 10 steps but no optimiser holds its gamma"):
        train(model, [optimizer], 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, [optimizer], 10)


def test_an_optimiser_of_the_gammas_may_step_by_itself() -> None:
    model = tt.reparametrize_(nn.Linear(3, 2))
    optimizers = [torch.optim.SGD([model.weight], lr=0.01), torch.optim.SGD([model.gamma, model.bias], lr=0.01)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizers, 15)
