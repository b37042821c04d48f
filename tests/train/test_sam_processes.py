"""SAM in the engine, in two processes: the very steps of one, as all climb along the average of their gradients."""

import multiprocessing
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine_recipes import Small, numbers, scores, squared_error
from gloo_processes import in_processes
from torch import Tensor, nn

from trimtab.stabilizers import stabilize_, with_changes
from trimtab.tasks.task import Examples, Task
from trimtab.train import Hardware, train
from trimtab.train.checkpoints import load_weights, newest_checkpoint

possible = dist.is_available() and dist.is_gloo_available() and "forkserver" in multiprocessing.get_all_start_methods()
pytestmark = pytest.mark.skipif(not possible, reason="needs gloo and forkserver")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order, over twelve steps


@dataclass(frozen=True, kw_only=True)
class Steady(Small):
    """Without noise and dropout, which would be other ones in each process. SGD, which keeps small errors small."""

    optimizer: str = "sgd"
    lr: float = 0.1
    clip: float | None = 1.0
    accumulate: int = 2

    def task(self) -> Task:
        inputs = torch.randn(70, 4, generator=torch.Generator().manual_seed(1))
        targets = inputs[:, :1] * inputs[:, 1:2]
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))
        held = Examples(70, lambda indices, generator: (inputs[indices], targets[indices]))
        return Task(model, held, squared_error, held, None, scores)


RECIPES = {spec: Steady(stabilizer=spec) for spec in ("sam:rho=0.5", "sam:rho=2.0:adaptive=true+sigma")}


def check(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    for place, recipe in enumerate(RECIPES.values()):
        for strategy in ("ddp", "fsdp"):
            hardware = Hardware(accelerator="cpu", strategy=strategy)
            train(recipe, f"{folder}/{strategy}{place}", lambda _: None, hardware=hardware)


def weights(recipe: Steady, folder: Path) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        changed = with_changes(recipe, recipe.stabilizer)
        model = stabilize_(recipe.task().model, changed.stabilizer, changes_made=True)
    newest = newest_checkpoint(folder)
    assert newest is not None
    load_weights(newest, model)
    return dict(model.state_dict())


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    in_processes(2, check, str(tmp_path))
    for place, recipe in enumerate(RECIPES.values()):
        train(recipe, tmp_path / f"one{place}", lambda _: None)
        expected, logged = weights(recipe, tmp_path / f"one{place}"), numbers(tmp_path / f"one{place}")
        for strategy in ("ddp", "fsdp"):
            found = weights(recipe, tmp_path / f"{strategy}{place}")
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, **CLOSE)
            for mine, theirs in zip(numbers(tmp_path / f"{strategy}{place}"), logged, strict=True):
                assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    # SAM's steps are others than those without it, by far more than what counts as close
    without = replace(recipe, stabilizer="sigma")
    train(without, tmp_path / "without", lambda _: None)
    assert (weights(without, tmp_path / "without")["0.weight"] - expected["0.weight"]).abs().max() > 0.01
