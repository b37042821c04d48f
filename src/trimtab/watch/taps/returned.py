"""The tap on modules that return their attention weights, and show nothing else."""

from typing import Any

import torch
from torch import Tensor

from trimtab.attention.stats import AttentionStats
from trimtab.watch.signals import HeadStats
from trimtab.watch.signals.heads import per_head_stats
from trimtab.watch.taps.backend import BackEnd, NotMeasuredError

# Rows of weights add up to one within the rounding of their own dtype.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def weights_in(result: Any) -> Tensor | None:
    """The first tensor of four dimensions, besides the first, among what a module returned; None without one."""
    if not isinstance(result, tuple | list):
        return None
    return next((part for part in result[1:] if _could_be(part)), None)


def _could_be(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim == 4 and part.dtype in _ROUNDING and part.numel() > 0


def measure(result: Any) -> HeadStats:
    """Entropies of the returned weights; there are no logits.

    Raises:
        NotMeasuredError: the rows do not add up to one.
    """
    weights = weights_in(result)
    if weights is None:
        raise NotMeasuredError("it returns no weights")
    weights = weights.detach()
    off = (weights.sum(-1, dtype=torch.float32) - 1).abs()
    if bool((weights < 0).any()) or bool((off > _ROUNDING[weights.dtype]).any()):
        raise NotMeasuredError("the weights it returns do not add up to one (dropout is in them, or they are none)")
    weights = weights if weights.dtype == torch.float64 else weights.float()
    entropy = torch.special.entr(weights).sum(-1)
    none = torch.full_like(entropy, torch.nan)
    return per_head_stats(AttentionStats(entropy, none, none, none), (weights > 0).sum(-1))


BACK_END = BackEnd(
    "returned weights",
    lambda call: measure(call.result),
    note="from the weights it returns: no logits; keys of weight 0 count as hidden",
)
