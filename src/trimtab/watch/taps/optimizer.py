"""A tap on the optimisers of a model."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from trimtab.watch.signals import gradient_norm


class OptimizerReading(NamedTuple):
    """What the optimisers of a model were seen to do.

    Attributes:
        lr: learning rate of each parameter group.
        grad_norm: L2 norm of the gradients as the optimisers got them, so after any clipping; None without any.
    """

    lr: list[float]
    grad_norm: float | None


class OptimizerTap:
    """Sees every optimiser in the process that holds parameters of the model, from its making until `close`."""

    def __init__(self, model: nn.Module, wanted: Callable[[], bool]) -> None:
        self._model, self._wanted = model, wanted
        # By the parameters held: of an optimiser wrapped in another, and of several steps, the last is kept.
        self._seen: dict[tuple[int, ...], OptimizerReading] = {}
        # Before the step, as some optimisers write into the gradients; after it, where a closure computes them.
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *call: None if _has_closure(*call) else self._step(call[0])),
            register_optimizer_step_post_hook(lambda *call: self._step(call[0]) if _has_closure(*call) else None),
        ]

    def take(self) -> OptimizerReading | None:
        """What was seen since the last time; None when no optimiser of the model took a step."""
        seen, self._seen = list(self._seen.values()), {}
        if not seen:
            return None
        norms = [reading.grad_norm for reading in seen if reading.grad_norm is not None]
        lr = [value for reading in seen for value in reading.lr]
        return OptimizerReading(lr, math.hypot(*norms) if norms else None)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _step(self, optimizer: Optimizer) -> None:
        if torch.compiler.is_compiling() or not self._wanted():
            return
        own = {id(parameter) for parameter in self._model.parameters()}
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
        if held:
            lr = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
            self._seen[tuple(map(id, held))] = OptimizerReading(lr, _unscaled(gradient_norm(held), optimizer))


def _has_closure(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return kwargs.get("closure") is not None or any(callable(arg) for arg in args)


def _unscaled(norm: float | None, optimizer: Optimizer) -> float | None:
    """A GradScaler hands its scale to fused optimisers, whose gradients are still multiplied by it."""
    scale = getattr(optimizer, "grad_scale", None)
    return norm if norm is None or scale is None else norm / float(scale)
