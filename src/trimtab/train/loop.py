"""A plain training loop: one recipe, one folder, one process.

The order of things is what a newcomer would write by hand. Everything that decides a number comes from the
recipe: the same recipe gives the same numbers on the same machine.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import RecipeError, RunFolderError
from trimtab.models.vit import ViT
from trimtab.reparam import SigmaReparam, fold_, reparametrize_
from trimtab.tasks.images.data import ImageData, load_images
from trimtab.tasks.images.recipes import ImagesRecipe
from trimtab.train.checkpoint import save_checkpoint
from trimtab.watch import Watch

Status = Literal["finished", "diverged"]


@dataclass(frozen=True)
class Progress:
    """What is known at a logged step.

    Attributes:
        step: optimiser steps taken.
        steps: optimiser steps asked for.
        loss: cross-entropy of this step's batch, nats.
        lr: learning rate of this step.
        accuracy: share of the test set that is classified rightly, when it was last measured; None before.
        entropy_min: lowest attention entropy over the heads, divided by its maximum (0 to 1); None if unseen.
        alarms: what every alarm so far said, oldest first.
        seconds: since the first step began.
    """

    step: int
    steps: int
    loss: float
    lr: float
    accuracy: float | None
    entropy_min: float | None
    alarms: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        folder: the run folder.
        status: "finished", or "diverged" when the loss left the finite numbers; such a run stops at its next
            logged step.
        steps: optimiser steps taken.
        loss: cross-entropy of the last batch, nats.
        accuracy: share of the test set that the final weights classify rightly.
        seconds: of training, evaluation included.
    """

    folder: Path
    status: Status
    steps: int
    loss: float
    accuracy: float
    seconds: float


def train(recipe: ImagesRecipe, folder: str | Path, on_step: Callable[[Progress], None] | None = None) -> Result:
    """Train a recipe's model from the start, watched, into an empty or new folder.

    The folder receives the run log of `trimtab.Watch`, `checkpoints/last.safetensors` and `result.json`.

    Args:
        recipe: what to train.
        folder: where to write.
        on_step: called after every logged step; it is then told of alarms, which are warnings of the logger
            "trimtab" otherwise. An exception it raises ends the run.

    Returns:
        How the run ended. A run that diverges is a result, not an error.

    Raises:
        RunFolderError: the folder is not empty, or is no folder.
        DataError: the data set cannot be loaded.
        RecipeError: the recipe's model does not fit its data.
    """
    folder = Path(folder)
    _refuse_used(folder)
    data = load_images(recipe.data)
    _check_fit(recipe, data)
    with _numerics(recipe.seed):
        model = build_model(recipe)
        result = _run(recipe, model, data, folder, on_step)
    save_checkpoint(folder / "checkpoints" / "last.safetensors", model, result.steps)
    _write_result(result)
    return result


def build_model(recipe: ImagesRecipe) -> nn.Module:
    """Draw the recipe's model from the global random number generator and apply its stabilizer."""
    model = ViT(recipe.model)
    if recipe.stabilizer != "none":
        reparametrize_(model, SigmaReparam(gamma_init=recipe.gamma_init))
    if recipe.stabilizer == "init-scale":
        fold_(model)  # weights gamma / sigma(W) · W, and nothing that keeps them so
    return model


def learning_rate(recipe: ImagesRecipe, step: int) -> float:
    """The learning rate of a step, counted from 1: linear warmup, then the recipe's schedule."""
    if step <= recipe.warmup_steps:
        return recipe.lr * step / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.lr * (1 + math.cos(math.pi * done)) / 2


def batches(num_examples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of indices (batch_size,), each pass in a new order, without its last, short batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_examples, generator=generator)
        yield from order.split(batch_size)[: num_examples // batch_size]


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData, batch_size: int = 500) -> float:
    """The share of the test set that is classified rightly; logits that are not finite count as wrong."""
    training = model.training
    model.eval()
    correct = 0
    for images, labels in zip(data.test_images.split(batch_size), data.test_labels.split(batch_size), strict=True):
        logits = model(data.standardize(images))  # (B, num_classes)
        right = (logits.argmax(dim=-1) == labels) & logits.isfinite().all(dim=-1)  # (B,)
        correct += int(right.sum())
    model.train(training)
    return correct / len(data.test_labels)


def _run(
    recipe: ImagesRecipe,
    model: nn.Module,
    data: ImageData,
    folder: Path,
    on_step: Callable[[Progress], None] | None,
) -> Result:
    optimizer = _optimizer(recipe, model.parameters())
    order = batches(len(data.train_labels), recipe.batch_size, recipe.seed)
    status: Status = "finished"
    measured: float | None = None
    value = math.nan
    start = time.perf_counter()
    describe = _describe(recipe, model)
    on_alarm = None if on_step is None else _ignore
    with Watch(model, folder, every=recipe.watch_every, run=describe, on_alarm=on_alarm) as watch:
        for step in range(1, recipe.steps + 1):
            logged = watch.next_step_is_logged
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            batch = next(order)  # (B,)
            images = data.standardize(data.train_images[batch])  # (B, C, height, width)
            loss = F.cross_entropy(model(images), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()

            value = loss.item()
            if not math.isfinite(value):
                status = "diverged"  # weights that met a NaN keep it: go on to the next line of the log only
            last = step == recipe.steps or (status == "diverged" and logged)
            metrics: dict[str, float] = {}
            if logged and (last or step % recipe.eval_every == 0):
                measured = metrics["accuracy"] = accuracy(model, data)
            watch.step(loss, **metrics)
            if logged and on_step is not None:
                seconds = time.perf_counter() - start
                low = watch.last.get("entropy_min")
                alarms = tuple(alarm.message for alarm in watch.alarms)
                lr = learning_rate(recipe, step)
                on_step(Progress(step, recipe.steps, value, lr, measured, low, alarms, seconds))
            if last:
                break
    if not logged or measured is None:  # the last step has no line of its own in the log
        measured = accuracy(model, data)
    return Result(folder, status, step, value, measured, time.perf_counter() - start)


def _ignore(_: object) -> None:
    """Leave an alarm to `Progress.alarms` and the run log."""


def _optimizer(recipe: ImagesRecipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def _describe(recipe: ImagesRecipe, model: nn.Module) -> dict[str, object]:
    """What run.json says about the run, beside what Watch knows by itself."""
    return {
        "task": "images",
        "recipe": asdict(recipe),
        "seed": recipe.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


@contextmanager
def _numerics(seed: int) -> Iterator[None]:
    """Seed torch and flush denormals, and leave both as they were.

    A collapsed softmax is full of denormals, which slow a CPU about 1.5 times; the results are the same.
    """
    flushing = sys.float_info.min / 2 == 0.0  # torch can set the mode but not tell it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(flushing)


def _refuse_used(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; a run needs a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} is not empty; choose another folder, or remove it first")


def _check_fit(recipe: ImagesRecipe, data: ImageData) -> None:
    """Refuse a model whose images or classes are not the data's."""
    size = data.train_images.shape[-1]
    facts = {"image_size": size, "in_channels": data.train_images.shape[1], "num_classes": data.num_classes}
    for name, expected in facts.items():
        got = getattr(recipe.model, name)
        if got != expected:
            raise RecipeError(f"{recipe.data} needs model {name} {expected}, the recipe has {got}")
    if recipe.batch_size > len(data.train_labels):
        raise RecipeError(
            f"batch_size {recipe.batch_size} is larger than {recipe.data}'s {len(data.train_labels):,} images"
        )


def _write_result(result: Result) -> None:
    """Write result.json aside, then rename it; a loss that is not finite is written as a string."""
    loss = result.loss if math.isfinite(result.loss) else str(result.loss)
    content = asdict(result) | {"loss": loss}
    del content["folder"]
    aside = result.folder / "result.json.part"
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(result.folder / "result.json")
