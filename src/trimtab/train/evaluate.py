"""Measure a model on examples: each of them once, whatever the number of processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.reparam.carried import is_sharded
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Batch, Examples, Task
from trimtab.train.buckets import by_length, cut
from trimtab.train.hardware import reshard_
from trimtab.train.order import derived_seed
from trimtab.train.randomness import kept

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_OF_THE_LOG = {"step", "loss", "lr", "alarms", "time"}


@torch.no_grad()
def evaluate(fabric: "Fabric", model: nn.Module, task: Task, examples: Examples, recipe: Recipe) -> dict[str, float]:
    """The metrics of a model in eval mode; training goes on afterwards as if nothing had been measured.

    The scores are summed in float64, so that a mean over a million examples is one, and what is not finite in them
    makes the metric so.

    Args:
        fabric: the processes, which share the examples; all of them must call.
        model: as `Task.score` is to call it.
        task: its score, what it prepares for that, and its summary.
        examples: what to measure on; the test examples by their own score, if the task has one.
        recipe: how many examples it measures at once, and its seed, of the generator that batches are made with.

    Returns:
        The metrics by name, the same in all processes.

    Raises:
        RecipeError: the task's score returns something else than one number for each example, or its summary has no
            metric of the name that decides, or one of a name that a line of the log has.
    """
    score = (task.test_score if examples is task.test else None) or task.score
    if score is None:
        raise RecipeError("a task needs a score to be measured")
    totals: dict[str, Tensor] = {}
    _share_buffers(model, fabric.world_size)
    with kept(fabric.device), _eval_mode(model):
        prepared: tuple[Any, ...] = ()
        if task.prepare is not None:
            with fabric.autocast():
                prepared = (task.prepare(model),)
        generator = torch.Generator().manual_seed(derived_seed("evaluation", recipe.seed, fabric.global_rank))
        for indices, valid in _shares(examples, recipe, fabric.global_rank, fabric.world_size):
            batch = fabric.to_device(examples.batch(indices, generator))
            with fabric.autocast():
                scores = _scores(score, model, batch, prepared, len(indices))
            for name, values in scores.items():
                totals[name] = totals.get(name, 0) + _wide(values[:valid]).sum()
    reshard_(model)
    sums = torch.stack(list(totals.values()))
    if fabric.world_size > 1:
        torch.distributed.all_reduce(sums)
    means = dict(zip(totals, (sums / examples.size).tolist(), strict=True))
    metrics = task.summarize(means, examples.size)
    if task.metric not in metrics:
        raise RecipeError(
            f"the task decides by the metric {task.metric!r}, and measures {', '.join(metrics) or 'nothing'}: "
            "let `score` or `summarize` return it, or name another in `metric`"
        )
    if taken := sorted(_OF_THE_LOG & set(metrics)):
        raise RecipeError(f"a line of the log has a {taken[0]!r} of its own: give the metric another name")
    return {name: float(value) for name, value in metrics.items()}


def _shares(examples: Examples, recipe: Recipe, rank: int, processes: int) -> Iterator[tuple[Tensor, int]]:
    """The batches of one process: indices (B,), and how many of them count.

    Every process has as many, of the same sizes, since each forward may be one of all processes together; what is
    missing is filled up with the last example, which then does not count.
    """
    parts = recipe.accumulate * processes
    size, each = examples.size, -(-examples.size // processes)
    if recipe.batch_tokens is None or examples.lengths is None:
        batch_size = recipe.eval_micro_batches * recipe.batch_size // parts
        for start in range(rank * each, (rank + 1) * each, batch_size):
            stop = min(start + batch_size, (rank + 1) * each)
            yield torch.arange(start, stop).clamp_(max=size - 1), max(0, min(stop, size) - start)
        return
    order = by_length(examples.lengths)
    filled = order[torch.arange(each * processes).clamp_(max=size - 1)]
    tokens = recipe.eval_micro_batches * recipe.batch_tokens // recipe.accumulate
    sizes = cut(examples.lengths[filled], tokens, processes)
    start = 0
    for together in sizes:
        own = together // processes
        first = start + rank * own
        yield filled[first : first + own], max(0, min(first + own, size) - first)
        start += together


def _scores(
    score: Callable[..., dict[str, Tensor]], model: nn.Module, batch: Batch, prepared: tuple[Any, ...], size: int
) -> dict[str, Tensor]:
    scores = score(model, batch, *prepared)
    if not isinstance(scores, dict) or not scores:
        raise RecipeError(
            'the task\'s score must be a dict of tensors by name, {"accuracy": ...}, '
            f"got {'an empty one' if isinstance(scores, dict) else type(scores).__name__}"
        )
    for name, values in scores.items():
        if not isinstance(values, Tensor) or values.shape != (size,):
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise RecipeError(
                f"the task's score must be one number for each example, a tensor of shape ({size},); "
                f"{name!r} is {found}: take no mean over the batch"
            )
    return scores


def _share_buffers(model: nn.Module, processes: int) -> None:
    """Measure with the buffers of the first process, which are those that are saved: each has seen other batches."""
    if processes == 1:
        return
    for buffer in model.buffers():
        if not is_sharded(buffer):
            first = buffer.detach().clone(memory_format=torch.contiguous_format)
            torch.distributed.broadcast(first, 0)
            if not torch.equal(first, buffer):  # a constant may be a view that cannot be written to
                buffer.copy_(first)


def _wide(values: Tensor) -> Tensor:
    return (values.cpu() if values.device.type == "mps" else values).double()  # Apple's GPUs have no float64


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, and then each module's own mode again: some may be kept in eval mode on purpose."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
