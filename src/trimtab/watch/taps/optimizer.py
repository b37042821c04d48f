"""A tap on the optimisers of a model."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from trimtab.reparam.carried import is_sharded
from trimtab.spectral.norms import norms
from trimtab.watch.signals.gradients import Moments, gradient_moments, gradient_norm, gradient_variances
from trimtab.watch.taps.activations import residual_blocks
from trimtab.watch.taps.entries import recomputes_or_captures


class OptimizerReading(NamedTuple):
    """What the optimisers of a model were seen to do.

    Attributes:
        lr: learning rate of each parameter group.
        grad_norm: L2 norm of the gradients as the optimisers got them, so after any clipping; None without any.
        grad_variance: variance over the entries of the gradients of each layer, as of `grad_norm`: of each block of the
            model, and of each module outside of them that holds parameters, by dotted name.
        update_ratio: ``|W_after - W_before| / |W_before|`` of each weight (a parameter of two or more dimensions) by
            dotted name; weights that were zero before the step have none.
    """

    lr: list[float]
    grad_norm: float | None
    grad_variance: dict[str, float]
    update_ratio: dict[str, float]


class OptimizerTap:
    """Sees every optimiser in the process that holds parameters of the model, from its making until `close`.

    During a step that is wanted it keeps a copy of the weights. Of sharded weights norms are sums over processes: a
    step that is wanted must be wanted on every process.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[], bool]) -> None:
        self._model, self._wanted = model, wanted
        # By the parameters held: of an optimiser wrapped in another, and of several steps, the last is kept.
        self._seen: dict[tuple[int, ...], tuple[list[float], dict[str, Moments]]] = {}
        self._block_of: dict[str, str] | None = None  # the block that a module is in, by their names
        self._ratios: dict[str, float] = {}
        self._before: dict[Optimizer, _Copies] = {}  # during a step
        self._hooks = [
            register_optimizer_step_pre_hook(self._enter),
            register_optimizer_step_post_hook(self._leave),
        ]

    def take(self) -> OptimizerReading | None:
        """What was seen since the last time; None when no optimiser of the model took a step."""
        seen, self._seen = list(self._seen.values()), {}
        ratios, self._ratios = self._ratios, {}
        self._before = {}  # of a step that an error ended
        if not seen:
            return None
        lr = [value for values, _ in seen for value in values]
        moments = {name: each for _, found in seen for name, each in found.items()}
        return OptimizerReading(lr, gradient_norm(moments), gradient_variances(moments, self._layer_of), ratios)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._before = {}

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or recomputes_or_captures() or not self._wanted() or _is_skipped(optimizer):
            return
        held = self._held(optimizer)
        if not held:
            return
        # Before the step, as some optimisers write into the gradients; after it, where a closure computes them.
        if not _has_closure(args, kwargs):
            self._note(optimizer, held)
        # Of an optimiser wrapped in another the outer one makes the whole update.
        outer = {name for copies in self._before.values() for name in copies}
        weights = {name: p.detach() for name, p in held.items() if _is_weight(p) and name not in outer}
        try:
            self._before[optimizer] = {name: (weight, weight.clone()) for name, weight in weights.items()}
        except Exception:  # no memory for copies, say: training needs all there is
            self._before[optimizer] = {}

    def _leave(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        copies = self._before.pop(optimizer, None)
        if copies is not None:
            with suppress(Exception):  # whatever it is, training goes on; this step has none
                self._ratios |= _update_ratios(copies)
            if _has_closure(args, kwargs):
                self._note(optimizer, self._held(optimizer))

    def _held(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """The model's parameters that an optimiser holds, by name, in the optimiser's order."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        held = (p for group in optimizer.param_groups for p in group["params"])
        return {names[id(p)]: p for p in held if id(p) in names}

    def _note(self, optimizer: Optimizer, held: dict[str, nn.Parameter]) -> None:
        lr = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        moments: dict[str, Moments] = {}
        with suppress(Exception):
            scale = _scale(optimizer)
            moments = {name: each.divided(scale) for name, each in gradient_moments(held).items()}
        self._seen[tuple(map(id, held.values()))] = lr, moments

    def _layer_of(self, parameter: str) -> str:
        """The block that a parameter is in, or the module that holds it; by their names."""
        if self._block_of is None:
            blocks = {id(block) for block in residual_blocks(self._model)}
            self._block_of = {
                f"{name}.{own}".rstrip("."): name
                for name, block in self._model.named_modules()
                if id(block) in blocks
                for own, _ in block.named_modules()
            }
        holder = parameter.rpartition(".")[0]
        return self._block_of.get(holder, holder)


_Copies = dict[str, tuple[Tensor, Tensor]]
"""Live weights and copies of them before a step, by name."""


@torch.no_grad()
def _update_ratios(copies: _Copies) -> dict[str, float]:
    """Relative updates of weights; the copies are used up."""
    after, before = [live for live, _ in copies.values()], [copy for _, copy in copies.values()]
    sizes = norms(before).tolist()
    for sharded in (False, True):  # torch takes no lists of both kinds
        pairs = [pair for pair in zip(before, after, strict=True) if is_sharded(pair[0]) == sharded]
        if pairs:
            torch._foreach_sub_(*map(list, zip(*pairs, strict=True)))
    changes = norms(before).tolist()
    return {name: change / size for name, change, size in zip(copies, changes, sizes, strict=True) if size != 0}


def _is_weight(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and parameter.is_floating_point() and not parameter.is_meta


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has told a fused optimiser to leave the weights as they are."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return kwargs.get("closure") is not None or any(callable(arg) for arg in args)


def _scale(optimizer: Optimizer) -> float:
    """A GradScaler hands its scale to fused optimisers, whose gradients are still multiplied by it."""
    return float(getattr(optimizer, "grad_scale", None) or 1.0)
