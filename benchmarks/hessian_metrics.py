"""Two more metrics of a task: the largest eigenvalues of the Hessian of its mean loss, raw and as Adam sees it."""

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from trimtab.tasks.task import Batch, Task
from trimtab.watch.signals.sharpness import sharpness

RAW, PRECONDITIONED = "hessian_eigenvalue", "preconditioned_eigenvalue"

_optimizers: "WeakKeyDictionary[nn.Module, Optimizer]" = WeakKeyDictionary()


def remembered(model: nn.Module, optimizers: list[Optimizer]) -> list[Optimizer]:
    """The optimisers themselves; the first preconditions from now on."""
    _optimizers[model] = optimizers[0]
    return optimizers


def with_eigenvalues(task: Task, batch_size: int) -> Task:
    """The task with the metrics, on one batch of training examples, the same in all runs of the same data."""
    order = torch.randperm(task.train.size, generator=torch.Generator().manual_seed(0))
    batch = task.train.batch(order[:batch_size], torch.Generator().manual_seed(0))
    return replace(task, summarize=lambda *means: task.summarize(*means) | eigenvalues(task, batch))


def eigenvalues(task: Task, batch: Batch) -> dict[str, float]:
    """The metrics by name. Nothing of them is left in the run: no gradient, random number, or look of its Watch."""
    task.model.eval()  # Watch counts training forwards
    try:
        found = sharpness(
            lambda: task.loss(task.model, batch),
            task.model.parameters(),
            optimizer=_optimizers.get(task.model),
            model=task.model,
            iterations=20,
            tolerance=0.03,
        )
    finally:
        task.model.train()
    adam = float("nan") if found.preconditioned is None else found.preconditioned  # before the first step
    return {RAW: found.eigenvalue, PRECONDITIONED: adam}
