"""The largest attention logit of each head, seen in a model's training forwards."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.watch.taps import AttentionTap


class MaxLogits(AttentionTap):
    """Sees the largest logit of every head, in forwards that are trained on, from its making until `close`."""

    def __init__(self, model: nn.Module, wanted: Callable[[], bool]) -> None:
        super().__init__(model, lambda: model.training and torch.is_grad_enabled() and wanted())

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See a forward that has just begun, when this was not there yet."""
        self._enter(args, kwargs)

    def renew(self) -> None:
        """Find what has been compiled since."""
        self._entries.renew()

    def take_maxima(self) -> dict[str, Tensor]:
        """Return the largest logits since the last time, each (H,), by the name of the module that called attention."""
        return {name: stats.max_logit for name, stats in self.take().items()}
