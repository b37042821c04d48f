"""One optimiser step: forwards and backwards of its micro-batches, clipping, and the update."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from trimtab.errors import RecipeError
from trimtab.reparam.carried import local
from trimtab.stabilizers import auxiliary_loss
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Batch, Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def step_function(
    fabric: "Fabric", model: nn.Module, task: Task, optimizers: Sequence[Optimizer], recipe: Recipe
) -> Callable[[list[Batch]], Tensor]:
    """Make the function that takes one step from its micro-batches and returns their mean loss, (), detached.

    The loss is the task's own, without what a stabilizer such as z-loss adds to it. An optimiser that asks for a
    closure, by an attribute ``needs_closure = True`` or by being torch's LBFGS, gets one that does all micro-batches
    again, clipping included, with the same random numbers: the passes of SAM see the same dropout.

    Raises:
        RecipeError: `Recipe.optimizers` returned something else than optimisers, or an optimiser with a closure is one
            of several, or meets fp16; or, in a step, the task's loss is no mean that can be trained on.
    """
    scaler = scaler_of(fabric)
    if not isinstance(optimizers, list | tuple) or not all(isinstance(each, Optimizer) for each in optimizers):
        raise RecipeError(
            f"the recipe's `optimizers` must return a list of torch optimisers, got {type(optimizers).__name__}: "
            "put a single one in a list"
        )
    closure_wanted = [each for each in optimizers if isinstance(each, LBFGS) or getattr(each, "needs_closure", False)]
    if closure_wanted and (len(optimizers) > 1 or scaler is not None):
        name = type(closure_wanted[0]).__name__
        raise RecipeError(
            f"{name} asks for a closure, which goes with no second optimiser and not with fp16: "
            'let it train all parameters, in precision "bf16" or "32"'
        )
    parameters = [p for p in task.model.parameters() if p.requires_grad]

    def gradients(batches: list[Batch]) -> Tensor:
        """Leave the gradients of the mean loss in the parameters, clipped, and return it."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        mean: Tensor | None = None
        parts = _parts(task, batches, fabric)
        for number, (batch, parts_of_step) in enumerate(zip(batches, parts, strict=True), 1):
            with nullcontext() if number == len(batches) else _not_yet_shared(model):
                with fabric.autocast():
                    loss = _checked(task.loss(model, batch))
                added = auxiliary_loss(task.model)
                part = loss.detach()
                loss = loss if added is None else loss + added
                if parts_of_step is not None:
                    loss, part = loss / parts_of_step, part / parts_of_step
                fabric.backward(loss)
            mean = part if mean is None else mean + part
        if recipe.clip is not None:
            if scaler is not None:
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
        assert mean is not None
        return mean

    def step(batches: list[Batch]) -> Tensor:
        loss = gradients(batches)
        for optimizer in optimizers:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        return loss

    def step_with_closure(batches: list[Batch]) -> Tensor:
        losses: list[Tensor] = []
        random = _random_state(fabric.device)

        def closure() -> Tensor:
            if losses:
                _restore_random_state(fabric.device, random)
            with torch.enable_grad():
                losses.append(gradients(batches))
            return losses[-1]

        closure_wanted[0].step(closure)  # torch says float, and means a loss
        if not losses:
            raise RecipeError(f"{type(closure_wanted[0]).__name__} never called the closure that it asked for")
        return losses[0]

    return step_with_closure if closure_wanted else step


def scaler_of(fabric: "Fabric") -> Any:
    """Torch's GradScaler under fp16, None otherwise."""
    return getattr(fabric.strategy.precision, "scaler", None)


@torch.no_grad()
def all_finite(model: nn.Module) -> Tensor:
    """Whether all trained weights are finite numbers, (), bool; of sharded ones, this process's part of them."""
    parts = [part for p in model.parameters() if p.requires_grad and (part := local(p.detach())).numel()]
    if not parts:
        return torch.tensor(True)
    return torch.stack(list(torch._foreach_norm(parts, ord=torch.inf))).isfinite().all()


def _parts(task: Task, batches: list[Batch], fabric: "Fabric") -> list[Tensor | int | None]:
    """What the loss of each micro-batch is divided by: the step's is their sum, in the mean of all processes.

    None for one.
    """
    if task.weight is None:
        return [len(batches) if len(batches) > 1 else None] * len(batches)
    weights = torch.stack([task.weight(batch) for batch in batches]).double()
    whole = weights.sum()
    if fabric.world_size > 1:
        torch.distributed.all_reduce(whole)
    elif len(batches) == 1:
        return [None]
    return list((whole / fabric.world_size / weights).float())


def _checked(loss: Any) -> Tensor:
    if isinstance(loss, Tensor) and loss.shape == () and loss.requires_grad:
        return loss
    if not isinstance(loss, Tensor):
        found = type(loss).__name__
    elif loss.shape != ():
        found = f"one of shape {tuple(loss.shape)}: take the mean over the examples"
    else:
        found = "one without a gradient: compute it from the model's outputs, outside of no_grad and detach"
    raise RecipeError(f"the task's loss must be a tensor of shape () to train on, got {found}")


@contextmanager
def _not_yet_shared(model: nn.Module) -> Iterator[None]:
    """Gradients stay in this process: those of the last micro-batch are shared with what was gathered before."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
