"""SAM in the engine: the same step as in a loop of one's own, resumed to the bit, with other stabilizers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_recipes import Small, assert_same, examples, numbers, scores, squared_error, trained
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import trimtab as tt
from trimtab.errors import RecipeError
from trimtab.stabilizers import with_changes
from trimtab.tasks.optimizers import build_optimizers
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Task
from trimtab.train import Progress, train
from trimtab.train.order import batch_indices, derived_seed

KINDS: dict[str, Any] = {"sam:rho=0.1": tt.SAM, "sam:rho=0.5:adaptive=true": tt.ASAM}


def by_hand(recipe: Small, kind: Any, rho: float) -> dict[str, Tensor]:
    """In two calls, with the random numbers of the first pass in both."""
    torch.manual_seed(recipe.seed)
    task = recipe.task()
    optimizer = kind(task.model.parameters(), torch.optim.AdamW, rho, lr=recipe.lr, weight_decay=0.0, fused=True)
    torch.manual_seed(derived_seed("training", recipe.seed, 0))
    for step in range(1, recipe.steps + 1):
        random = torch.get_rng_state()
        for end in (optimizer.first_step, optimizer.second_step):
            torch.set_rng_state(random)
            generator = torch.Generator().manual_seed(derived_seed("batch", recipe.seed, step, 0))
            optimizer.zero_grad()
            for part in batch_indices(70, recipe.batch_size, recipe.seed, step).chunk(recipe.accumulate):
                (task.loss(task.model, task.train.batch(part, generator)) / recipe.accumulate).backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(task.model.parameters(), recipe.clip)
            end()
    return task.model.state_dict()


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip": 0.3, "watch": True}], ids=["plain", "all"])
def test_the_engine_takes_the_steps_of_a_loop_by_hand(spec: str, options: dict[str, Any], tmp_path: Path) -> None:
    recipe = Small(stabilizer=spec, **options)
    train(recipe, tmp_path)
    rho = with_changes(recipe, spec).rho
    assert rho is not None
    assert_same(trained(recipe, tmp_path), by_hand(recipe, KINDS[spec], rho))


class Killed(BaseException):
    """Goes through everything, as a kill does."""


@pytest.mark.parametrize(
    ("spec", "optimizer"), [("sam+sigma", "adamw"), ("sam:adaptive=true+clip+warmup", "sgd"), ("sam", "lars")]
)
def test_a_run_that_breaks_off_goes_on_to_the_bit(spec: str, optimizer: Any, tmp_path: Path) -> None:
    recipe = Small(stabilizer=spec, optimizer=optimizer, weight_decay=0.1, checkpoint_every=5, steps=16, watch=True)
    train(recipe, tmp_path / "whole", lambda _: None)

    def on_step(progress: Progress) -> None:
        if progress.step >= 8:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path / "broken", on_step)
    train(recipe, tmp_path / "broken", lambda _: None)
    assert_same(saved(tmp_path / "broken"), saved(tmp_path / "whole"))
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")


def saved(folder: Path) -> dict[str, Tensor]:
    """The tensors of the last checkpoint, those of the optimiser included."""
    last = max((folder / "checkpoints").glob("step-*"))
    files = [load_file(last / f"{name}.safetensors") for name in ("model", "optimizer")]
    assert files[1]
    return {f"{i}.{name}": tensor for i, file in enumerate(files) for name, tensor in file.items()}


def test_together_with_sigma_the_vectors_move_once_a_step(tmp_path: Path) -> None:
    """The optimiser that steps is the one that a run without SAM has, and it is stepped once."""
    steps = []
    counting = register_optimizer_step_post_hook(lambda optimizer, *_: steps.append(type(optimizer).__name__))
    try:
        train(Small(stabilizer="sam+sigma"), tmp_path)
    finally:
        counting.remove()
    assert steps == ["AdamW"] * 12


@dataclass(frozen=True, kw_only=True)
class Normalised(Small):
    def task(self) -> Task:
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=None), nn.GELU(), nn.Linear(8, 1))
        return Task(model, examples(70, 1), squared_error, examples(30, 2), None, scores)


def test_batch_norm_counts_the_first_pass_alone(tmp_path: Path) -> None:
    recipe = Normalised(rho=0.05)
    train(recipe, tmp_path)
    assert trained(recipe, tmp_path)["1.num_batches_tracked"] == recipe.steps


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(RecipeError, match="does not go with optimizer muon, which is two"):
        with_changes(Recipe(), "sam+muon")
    with pytest.raises(RecipeError, match="does not go with precision fp16"):
        with_changes(Recipe(precision="fp16"), "sam")
    with pytest.raises(RecipeError, match="sam: rho must be positive, got 0"):
        with_changes(Recipe(), "sam:rho=0")


def test_groups_of_the_recipes_optimiser_are_kept() -> None:
    model = Small().task().model
    (optimizer,) = build_optimizers(replace(Small(), rho=0.3, weight_decay=0.2), model)
    assert isinstance(optimizer, tt.SAM)
    assert [(group["weight_decay"], group["rho"]) for group in optimizer.param_groups] == [(0.2, 0.3), (0.0, 0.3)]
