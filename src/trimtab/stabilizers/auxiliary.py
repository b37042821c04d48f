"""Terms that modules add to the loss: recorded in the forward, read once by whoever has the loss."""

from typing import Any

import torch
from torch import Tensor, nn

_NAME = "_auxiliary_term"


class _Term:
    """Holds a term of the last forward. It is part of no copy and no pickle: a term belongs to one graph."""

    def __init__(self, value: Tensor | None = None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Term":
        return _Term()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Term, ()


def record(module: nn.Module, term: Tensor) -> None:
    """Keep a term of this forward, a scalar with its graph, until `auxiliary_loss` reads it.

    A module has one term: one that nobody read is replaced by the next forward's. Activations that are recomputed in
    the backward record nothing. (A module inside reentrant checkpointing runs its forward without gradients, so its
    terms have none: use ``use_reentrant=False``.)
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return
    module.__dict__[_NAME] = _Term(term)


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Return the sum of the terms recorded since the last call, (), and forget them; None if there are none.

    Call it once for every forward in training, and add it to the loss before the backward.
    """
    total: Tensor | None = None
    for module in model.modules():
        held = module.__dict__.pop(_NAME, None)
        if held is not None and held.value is not None:
            total = held.value if total is None else total + held.value
    return total
