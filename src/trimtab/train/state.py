"""`TrainState`: everything that the next step depends on, as a checkpoint holds it."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.train.log import PlainLog
from trimtab.watch import Watch


class Tensors(Protocol):
    """Something whose state is tensors by name: an average of the weights."""

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, whole, also when they are sharded."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors back; they are not to be kept."""


@dataclass
class TrainState:
    """Everything that the next step depends on, beside the recipe and the random number generators.

    Attributes:
        model: with its stabilizers, perhaps sharded; not wrapped by what distributes or compiles it.
        optimizers: of its parameters.
        average: the moving average of the weights, if there is one.
        scaler: torch's GradScaler under fp16.
        watch: the Watch that looks on, or the plain log in its place.
        step: optimiser steps taken.
        facts: plain values that JSON can hold: seconds so far; metrics by name ("metrics" of the last evaluation,
            "best", "best_saved"); evaluations without a better.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    average: Tensors | None = None
    scaler: Any = None
    watch: Watch | PlainLog | None = None
    step: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
