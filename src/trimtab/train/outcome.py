"""What a run knows of itself: its facts as a checkpoint keeps them, when it ends, and what it tells."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Task
from trimtab.train.clock import Clock
from trimtab.train.loader import Loader
from trimtab.train.memory import peak_memory
from trimtab.train.progress import Progress, Result, Status
from trimtab.train.state import TrainState

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def first_facts(initial: dict[str, float]) -> dict[str, Any]:
    """The facts of a run before its first step, see `TrainState.facts`."""
    return {
        "initial": initial,
        "metrics": {},
        "best": {},
        "best_step": 0,
        "best_saved": {},
        "without_better": 0,
        "loss": math.nan,
        "diverged": False,
        "seconds": 0.0,
        "step_seconds": math.nan,
        "loader_seconds": math.nan,
    }


def end_of(recipe: Recipe, state: TrainState) -> Status | None:
    """How a run has ended, None while it has not."""
    facts = state.facts
    if facts["diverged"]:
        return "diverged"
    if state.step >= recipe.steps:
        return "finished"
    if recipe.patience is not None and facts["without_better"] >= recipe.patience:
        return "stopped early"
    if recipe.seconds is not None and facts["seconds"] >= recipe.seconds:
        return "out of time"
    return None


def note_metrics(facts: dict[str, Any], metrics: dict[str, float], task: Task, step: int) -> None:
    """Write an evaluation into the facts."""
    facts["metrics"] = metrics
    better = is_better(metrics, facts["best"], task)
    if better:
        facts |= {"best": metrics, "best_step": step}
    facts["without_better"] = 0 if better else facts["without_better"] + 1


def is_better(new: dict[str, float], old: dict[str, float], task: Task) -> bool:
    """Whether metrics are better than others, which may be empty. Neither empty ones nor NaN ever are."""
    if math.isnan(new.get(task.metric, math.nan)):
        return False
    if not old:
        return True
    return new[task.metric] > old[task.metric] if task.higher_is_better else new[task.metric] < old[task.metric]


def agree(fabric: "Fabric", loss: Tensor, broken: Tensor, asked: bool) -> tuple[float, bool, bool]:
    """The mean loss of all processes, whether it was ever not finite in one, and whether one was asked to stop."""
    if fabric.world_size == 1:
        return loss.item(), bool(broken), asked
    told = torch.stack([loss.double(), broken.double(), torch.tensor(asked, device=loss.device).double()])
    torch.distributed.all_reduce(told)
    mean, diverged, stops = told.tolist()
    return mean / fabric.world_size, diverged > 0, stops > 0


def elapsed(recipe: Recipe, clock: Clock, fabric: "Fabric") -> float:
    """Seconds of training so far; the same in all processes where the recipe's numbers depend on it."""
    seconds = clock.seconds()
    if recipe.seconds is None or fabric.world_size == 1:
        return seconds
    told = torch.tensor(seconds, dtype=torch.float64, device=fabric.device)
    torch.distributed.broadcast(told, 0)
    return told.item()


def progress_of(recipe: Recipe, state: TrainState, clock: Clock, worst_head: str | None, examples: float) -> Progress:
    """What is told of a logged step, in which there were so many examples."""
    watch, facts = state.watch, state.facts
    assert watch is not None
    return Progress(
        step=state.step,
        steps=recipe.steps,
        loss=facts["loss"],
        lr=max(group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups),
        metrics=facts["metrics"] or facts["initial"],
        entropy_min=watch.last.get("entropy_min"),
        worst_head=worst_head,
        alarms=tuple(alarm.message for alarm in watch.alarms),
        seconds=facts["seconds"],
        samples_per_second=examples / clock.lately,
    )


def result_of(
    folder: Path,
    status: Status,
    recipe: Recipe,
    task: Task,
    state: TrainState,
    test: dict[str, float],
    device: torch.device,
    examples: float,
) -> Result:
    """What is told of a run at its end, with so many examples in a step."""
    facts = state.facts
    return Result(
        folder=folder,
        status=status,
        steps=state.step,
        loss=facts["loss"],
        seconds=facts["seconds"],
        step_seconds=facts["step_seconds"],
        samples_per_second=examples / facts["step_seconds"],
        loader_samples_per_second=examples / facts["loader_seconds"],
        peak_memory_bytes=peak_memory(device),
        initial=facts["initial"],
        metrics=facts["metrics"],
        best=facts["best"],
        best_step=facts["best_step"],
        test=test,
        metric=None if task.score is None else task.metric,
        higher_is_better=task.higher_is_better,
    )


def note_times(facts: dict[str, Any], clock: Clock, loader: Loader, seconds: float) -> None:
    """Write into the facts how long things take; what this process has not measured stays as it was."""
    facts["seconds"] = seconds
    if not math.isnan(clock.step_seconds):
        facts["step_seconds"] = clock.step_seconds
    if not math.isnan(loader.batch_seconds):
        facts["loader_seconds"] = loader.batch_seconds
