"""Which converted modules are alive, and the one hook that moves their vectors after every optimiser step.

Version counters cannot tell when a weight was updated (fused optimisers and ``.data`` writes do not count up, sharded
training shows 0, compilation folds them to constants), so the optimiser's own post-step hook does.
"""

import math
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from trimtab.errors import ConversionError
from trimtab.reparam.carried import carried_names
from trimtab.reparam.refresh import refresh_vectors_

_alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_known_to_be_used: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_steps_without_gamma: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()
# An optimiser of the gammas may step more rarely than that of the weights.
_PATIENCE = 10
_hook: Any = None


def add(module: nn.Module) -> None:
    """Have the vectors of a converted module move after every step of an optimiser that holds its weights."""
    global _hook
    _alive.add(module)
    if _hook is None:
        # A compiled step calls it too; its many shapes are no work for a compiler.
        _hook = register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def discard(module: nn.Module) -> None:
    """Forget a module that has been folded."""
    _alive.discard(module)


def _warn_if_bypassed(module: Any, weight_name: str, held: set[int]) -> None:
    """Say once if a weight had a gradient and its gamma none: then something reads the weight past the layer."""
    if module in _known_to_be_used:
        return
    gamma = module.get_parameter(carried_names(weight_name)[0])
    # An optimiser that does not hold gamma says nothing: its gradient may be used up by now, or not be there yet.
    if id(gamma) not in held or getattr(module, weight_name).grad is None or not gamma.requires_grad:
        return
    _known_to_be_used.add(module)
    if gamma.grad is None:
        warnings.warn(
            f"{module.plain_class.__name__} {tuple(module.get_parameter(weight_name).shape)}: its {weight_name} got a "
            "gradient but its gamma none. Either the layer took no part in this step and only a penalty reached it, or "
            "some code reads the weight itself, where sigma-Reparam has no effect: then leave the layer out with "
            "filter_fn (`trimtab.describe(model)` names the layers)",
            stacklevel=2,
        )


def _warn_if_left_behind(module: Any, weight_name: str, held: set[int]) -> None:
    """Say once if the weight is trained step after step and no optimiser ever held its gamma."""
    gamma, weight = (module._parameters.get(name) for name in (carried_names(weight_name)[0], weight_name))
    if gamma is None or weight is None:  # somebody flattened them
        return
    if id(gamma) in held or not gamma.requires_grad:
        _steps_without_gamma[module] = -math.inf
    elif gamma.grad is not None and id(weight) in held:
        _steps_without_gamma[module] = _steps_without_gamma.get(module, 0) + 1
        if _steps_without_gamma[module] == _PATIENCE:
            warnings.warn(
                f"{module.plain_class.__name__}: its {weight_name} has taken {_PATIENCE} steps but no optimiser holds "
                "its gamma, which stays as it is. Build the optimiser after converting, or add the gammas to it with "
                "add_param_group; to leave them fixed, set requires_grad_(False) on them",
                stacklevel=2,
            )


def _refuse_flattened(modules: Iterable[nn.Module]) -> None:
    """Raise if FullyShardedDataParallel holds the weights of converted modules, in one long vector or as vectors."""
    if any(module in _alive for module in modules):
        raise ConversionError(
            "FullyShardedDataParallel flattens the weights of converted layers, so that no sigma can be followed: "
            "shard the converted model with torch.distributed.fsdp.fully_shard"
        )


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = {id(p) for p in parameters}
    _refuse_flattened(module for p in parameters for _, module, *_ in getattr(p, "_param_infos", ()))
    by_weight: dict[int, list[tuple[Any, str]]] = {}
    for module in list(_alive):
        for weight_name in module.__dict__.get("_carried_sizes", ()):
            weight = module._parameters.get(weight_name)
            if _steps_without_gamma.get(module, 0) >= 0:
                _warn_if_left_behind(module, weight_name, held)
            if weight is not None and id(weight) in held:
                _refuse_flattened([module] if weight.ndim < 2 else [])
                by_weight.setdefault(id(weight), []).append((module, weight_name))
                _warn_if_bypassed(module, weight_name, held)
    if not by_weight:  # gammas, gains and biases are often stepped by optimisers of their own
        return
    # In the order of the optimiser's parameters, which is the same on every process: sharded weights talk.
    found = (place for p in parameters for place in by_weight.get(id(p), ()))
    refresh_vectors_(module.carried(weight_name) for module, weight_name in found)
