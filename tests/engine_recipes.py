"""A task of milliseconds for tests of the engine, and the loop that one would write by hand for it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Examples, Task
from trimtab.train.checkpoints import load_weights, newest_checkpoint
from trimtab.train.order import batch_indices, derived_seed


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def scores(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"eval_loss": (model(batch[0]) - batch[1]).square().mean(dim=-1)}


def examples(size: int, seed: int) -> Examples:
    inputs = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
    targets = inputs[:, :1] * inputs[:, 1:2]

    def batch(indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn(len(indices), 4, generator=generator)
        return inputs[indices] + noise, targets[indices]

    return Examples(size, batch)


@dataclass(frozen=True, kw_only=True)
class Small(Recipe):
    """Products of two numbers, by a small network with dropout."""

    width: int = 8
    dropout: float = 0.25
    steps: int = 12
    batch_size: int = 16
    lr: float = 1e-2
    watch: bool = False
    watch_every: int = 4
    eval_every: int = 4

    def task(self) -> Task:
        model = nn.Sequential(
            nn.Linear(4, self.width), nn.GELU(), nn.Linear(self.width, self.width), nn.Dropout(self.dropout),
            nn.Linear(self.width, 1),
        )  # fmt: skip
        return Task(model, examples(70, 1), squared_error, examples(30, 2), examples(20, 3), scores)


def by_hand(recipe: Small, factor: Any = lambda step: 1.0) -> tuple[nn.Module, list[Tensor]]:
    """Train plainly; returns the model and the moving average of its parameters."""
    torch.manual_seed(recipe.seed)
    task = recipe.task()
    model = task.model
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, recipe.lr, fused=True)
    average = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(derived_seed("training", recipe.seed, 0))
    for step in range(1, recipe.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * factor(step)
        generator = torch.Generator().manual_seed(derived_seed("batch", recipe.seed, step, 0))
        optimizer.zero_grad()
        indices = batch_indices(task.train.size, recipe.batch_size, recipe.seed, step)
        for part in indices.chunk(recipe.accumulate):
            loss = task.loss(model, task.train.batch(part, generator))
            (loss / recipe.accumulate).backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if recipe.ema is not None:
            with torch.no_grad():
                for kept, p in zip(average, model.parameters(), strict=True):
                    kept.lerp_(p, 1 - recipe.ema)
    return model, average


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The log without its clock."""
    return [{name: value for name, value in line.items() if name != "time"} for line in lines(folder)]


def trained(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """The weights that a run ended with."""
    with torch.random.fork_rng():
        model = recipe.task().model
    newest = newest_checkpoint(folder)
    assert newest is not None
    load_weights(newest, model)
    return model.state_dict()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@dataclass(frozen=True, kw_only=True)
class Sequences(Recipe):
    """Numbers in a row, 1 to 9 of them; the next one of each is told by a linear layer, and its loss is per token."""

    steps: int = 5
    batch_tokens: int | None = 90
    optimizer: Any = "sgd"
    lr: float = 0.1
    watch: bool = False
    watch_every: int = 5
    eval_every: int = 5

    def task(self) -> Task:
        lengths = torch.randint(1, 10, (61, 1), generator=torch.Generator().manual_seed(1))
        values = torch.randn(61, 9, generator=torch.Generator().manual_seed(2))

        def batch(indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            longest = int(lengths[indices].max())
            return values[indices, :longest], torch.arange(longest) < lengths[indices]

        def errors(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            rows, known = batch
            told = model(rows.unsqueeze(-1)).squeeze(-1)
            return (told - 2 * rows).square() * known

        def score(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            return {"errors": errors(model, batch).sum(1), "tokens": batch[1].sum(1).float()}

        held = Examples(61, batch, lengths)
        return Task(
            nn.Linear(1, 1), held, lambda model, batch: errors(model, batch).sum() / batch[1].sum(), held, held, score,
            summarize=lambda means, size: {"eval_loss": means["errors"] / means["tokens"]},
            weight=lambda batch: batch[1].sum(), files={"lengths.txt": str(lengths.flatten().tolist())},
        )  # fmt: skip
