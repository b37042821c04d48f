"""`qk-clip`: after an optimiser step, queries and keys of heads with too large logits are scaled down."""

from dataclasses import dataclass

from torch import nn

from trimtab.errors import ConversionError, RecipeError
from trimtab.stabilizers.clipper import clip_after_steps_, clipper_of
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer


@register("qk-clip")
@dataclass(frozen=True)
class QKClip(Stabilizer):
    """QK-Clip: after each optimiser step, the weights of heads whose largest logit exceeded tau are scaled back to it.

    Kimi Team, "Kimi K2", 2025, arXiv 2507.20534, section 2.1 (MuonClip). With S the largest logit of a head in the
    forwards of the step, over all micro-batches and processes, and ``g = min(1, tau / S)``, W_q and W_k of that head,
    and their biases, are multiplied by sqrt(g): had they been so before, S would have been tau. Heads within tau keep
    their weights bit for bit. Where query heads share a key head, that is multiplied by the root of their largest g,
    and each query by the rest of its own. Under sigma-Reparam the size of W does not count: the gammas are scaled
    instead, and all heads of a gamma as the worst of them needs. The forward pass stays as it is.

    When not to use it: with QK-norm, which makes the size of W_q and W_k irrelevant, or a soft cap of the attention
    logits, which hides how large they were. With attention whose queries and
    keys never show (`Watch.coverage` lists it). Where logits have a large additive bias, that part is not scaled. The
    logits are computed a second time to see them, in a compiled model by one more forward: with `every=n` only in every
    n-th step. In a loop of one's own that compiles the model, `see_compiled_` has the first step seen, too.

    Attributes:
        tau: the largest logit that is let be.
        every: optimiser steps from one clip to the next. Above 1, a buffer ``qk_clip_steps`` counts them.
    """

    order = 90

    tau: float = 100.0
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau", "every"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"qk-clip: {name} must be positive, got {getattr(self, name)}")

    def apply_(self, model: nn.Module) -> None:
        """Have the weights clipped after every step of any torch.optim optimiser that holds them.

        Raises:
            ConversionError: no attention is found, its weights cannot be scaled head by head, or it has QK-norm or a
                soft cap.
        """
        if any(clipper_of(module) is not None for module in model.modules()):
            raise ConversionError("the model, or a part of it, has qk-clip already")
        clip_after_steps_(model, self.tau, self.every)
