"""What `SAM` accepts: errors say what was expected, what came and what to do."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from trimtab.reparam.carried import is_sharded

Perturbation = Literal["synchronised", "per-worker"]


def check_arguments(params: object, optimizer: object, model: object, perturbation: object) -> None:
    """Refuse what cannot be parameters, make their optimiser, be their model or name a perturbation."""
    if isinstance(params, Tensor):
        raise TypeError("expected params to be parameters, or groups of them, got a single tensor: put it in a list")
    if not callable(optimizer):
        raise TypeError(
            f"expected optimizer to be a class such as torch.optim.AdamW, got {type(optimizer).__name__}: "
            "SAM makes the optimiser itself"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    if perturbation not in get_args(Perturbation):
        raise ValueError(f'expected perturbation to be "synchronised" or "per-worker", got {perturbation!r}')


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse a rho or an eta, where there is one, that is none."""
    for name in {"rho", "eta"} & set(group):
        value = group[name]
        if name == "eta" and value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"expected {name} to be a number, got {value!r}")
        if not 0 <= value < math.inf:
            raise ValueError(f"expected {name} to be a finite number from 0 up, got {value}")


def check_optimizer(made: object, perturbation: Perturbation) -> None:
    """Refuse what is no optimiser, one that needs a closure, and shards that are to climb by themselves."""
    if not isinstance(made, Optimizer):
        raise TypeError(f"expected optimizer to make a torch optimiser, it made a {type(made).__name__}")
    if isinstance(made, LBFGS) or getattr(made, "needs_closure", False):
        raise TypeError(
            f"{type(made).__name__} calls a closure itself: SAM needs an optimiser that steps by a gradient"
        )
    if perturbation == "per-worker" and any(is_sharded(p) for group in made.param_groups for p in group["params"]):
        raise ValueError(
            'perturbation="per-worker" needs whole gradients, and some parameters are sharded: use "synchronised"'
        )
