"""`z-loss`: a penalty on the logarithm of the output softmax's denominator."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.stabilizers.auxiliary import record
from trimtab.stabilizers.places import output_head, refuse_hook
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer


@register("z-loss")
@dataclass(frozen=True)
class ZLoss(Stabilizer):
    """z-loss: coefficient · mean of log² Z is added to the loss, Z being the denominator of the output softmax.

    Chowdhery et al., "PaLM", 2022, arXiv 2204.02311, section 5; Wortsman et al., arXiv 2309.14322, use it against
    output logits that drift towards large or very negative values. Each training forward records the term in the layer
    that makes the logits, the mean being over all of its rows, padding included; the engine adds it to the loss, and
    in a loop of one's own ``trimtab.auxiliary_loss(model)`` returns it. The model's function stays as it is.

    When not to use it: where the logits are no logits of a softmax (regression, sigmoid outputs), or with a loss that
    shares the denominator over several layers. Against large *attention* logits it does nothing.

    Attributes:
        coefficient: of the term.
        head: dotted name of the layer that makes the logits; None finds it.
    """

    order = 60

    coefficient: float = 1e-4
    head: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficient <= 0:
            raise RecipeError(f"z-loss: coefficient must be positive, got {self.coefficient}")

    def apply_(self, model: nn.Module) -> None:
        """Let the layer that makes the logits record the term.

        Raises:
            ConversionError: that layer is not found, or has z-loss already.
        """
        head = output_head(model, self.head, "z-loss")
        refuse_hook(head, _RecordZLoss, "z-loss")
        head.register_forward_hook(_RecordZLoss(self.coefficient))


def z_loss(logits: Tensor) -> Tensor:
    """Return the mean of log² Z, (), in at least float32.

    Its gradient is ``2 log Z softmax(logits) / rows``.

    Args:
        logits: (..., V).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(-1).square().mean()


@dataclass(frozen=True)
class _RecordZLoss:
    """A forward hook."""

    coefficient: float

    def __call__(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        if layer.training and torch.is_grad_enabled():
            record(layer, self.coefficient * z_loss(output))
