"""Optimisers that ask for a closure: the passes of one step see the same batch, dropout and clipping."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_recipes import Small, assert_same, trained
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.train import train
from trimtab.train.order import batch_indices, derived_seed


class TwoPasses(torch.optim.Optimizer):
    """Climbs by rho along the gradient, and descends with the gradient it finds there (Foret et al., 2021)."""

    needs_closure = True

    def __init__(self, parameters: Any, lr: float, rho: float = 0.05) -> None:
        super().__init__(list(parameters), {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Any) -> Tensor:
        group = self.param_groups[0]
        loss = closure()
        gradients = [p.grad.clone() for p in group["params"]]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        before = [p.clone() for p in group["params"]]
        for p, g in zip(group["params"], gradients, strict=True):
            p.add_(g, alpha=group["rho"] / norm.item())
        closure()
        for p, old in zip(group["params"], before, strict=True):
            p.copy_(old).sub_(p.grad, alpha=group["lr"])
        return loss


@dataclass(frozen=True, kw_only=True)
class Climbing(Small):
    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [TwoPasses(model.parameters(), self.lr)]


def by_hand(recipe: Climbing) -> dict[str, Tensor]:
    """The same with deep copies in place of a closure."""
    torch.manual_seed(recipe.seed)
    task = recipe.task()
    parameters = list(task.model.parameters())
    torch.manual_seed(derived_seed("training", recipe.seed, 0))

    def gradients(step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(derived_seed("batch", recipe.seed, step, 0))
        task.model.zero_grad()
        for part in batch_indices(70, recipe.batch_size, recipe.seed, step).chunk(recipe.accumulate):
            (task.loss(task.model, task.train.batch(part, generator)) / recipe.accumulate).backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
        return [p.grad.clone() for p in parameters]

    for step in range(1, recipe.steps + 1):
        random = torch.get_rng_state()
        first = gradients(step)
        before = [p.detach().clone() for p in parameters]
        norm = torch.stack([g.norm() for g in first]).norm().item()
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p.add_(g, alpha=0.05 / norm)
        torch.set_rng_state(random)
        second = gradients(step)
        with torch.no_grad():
            for p, old, g in zip(parameters, before, second, strict=True):
                p.copy_(old).sub_(g, alpha=recipe.lr)
    return task.model.state_dict()


@pytest.mark.parametrize("recipe", [Climbing(lr=0.1), Climbing(lr=0.1, accumulate=2, clip=0.3)], ids=["plain", "all"])
def test_both_passes_see_the_same(recipe: Climbing, tmp_path: Path) -> None:
    train(recipe, tmp_path)
    assert_same(trained(recipe, tmp_path), by_hand(recipe))


@dataclass(frozen=True, kw_only=True)
class Quadratic(Small):
    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)]


def test_lbfgs_gets_a_closure_too(tmp_path: Path) -> None:
    result = train(Quadratic(dropout=0.0, batch_size=64, steps=20), tmp_path)
    assert result.metrics["eval_loss"] < 0.5 * result.initial["eval_loss"]


@dataclass(frozen=True, kw_only=True)
class Crowd(Small):
    second: bool = True

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        first = TwoPasses(model[0].parameters(), self.lr)
        if not self.second:
            first.step = lambda closure: None  # it never asks
            return [first]
        return [first, torch.optim.SGD(model[2].parameters(), self.lr)]


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="TwoPasses asks for a closure, which goes with no second optimiser"):
        train(Crowd(), tmp_path / "two")
    with pytest.raises(RecipeError, match="TwoPasses never called the closure"):
        train(replace(Crowd(), second=False), tmp_path / "none")
