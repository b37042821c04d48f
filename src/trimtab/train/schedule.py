"""The learning rate of a step: pure functions of the recipe, the step and the time."""

import math
from collections.abc import Sequence

from torch.optim import Optimizer

from trimtab.tasks.recipe import Recipe


def learning_rate_factor(recipe: Recipe, step: int, elapsed: float = 0.0) -> float:
    """What the peak learning rate is multiplied by.

    Args:
        recipe: its schedule, warmup, steps and seconds.
        step: counted from 1.
        elapsed: seconds of training before the step. In a recipe with a limit of `seconds`, the schedule is as far as
            the further of the two: ``max(step / steps, elapsed / seconds)``.

    Returns:
        0 to 1 (or more, where a step schedule grows).
    """
    if step <= recipe.warmup_steps:
        return step / recipe.warmup_steps
    at = float(step)
    if recipe.seconds is not None:
        at = max(at, recipe.steps * min(1.0, elapsed / recipe.seconds))
    after = at - recipe.warmup_steps
    if recipe.schedule == "cosine":
        return _cosine(recipe, min(1.0, after / max(1, recipe.steps - recipe.warmup_steps)))
    if recipe.schedule == "cosine_restarts":
        return _cosine(recipe, (after - 1) % recipe.restart_every / recipe.restart_every)
    if recipe.schedule == "step":
        return recipe.step_factor ** math.floor((after - 1) / recipe.step_every)
    if recipe.schedule == "inverse_sqrt":
        return math.sqrt(max(1, recipe.warmup_steps) / at)
    return 1.0


def _cosine(recipe: Recipe, done: float) -> float:
    """Half a wave, from 1 where nothing is done, 0, to that of `min_lr` where all is, 1."""
    lowest = recipe.min_lr / recipe.lr
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2


def learning_rate(recipe: Recipe, step: int, elapsed: float = 0.0) -> float:
    """The learning rate of a step, counted from 1."""
    return recipe.lr * learning_rate_factor(recipe, step, elapsed)


def set_learning_rates(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Give every group of parameters its peak learning rate, which is the one it was made with, times a factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
