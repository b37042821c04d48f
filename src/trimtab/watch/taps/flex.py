"""The tap on `flex_attention`, called as it is or compiled."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.watch.signals import HeadStats, head_stats
from trimtab.watch.taps.backend import BackEnd, Call, as_attention_sees

# Where torch defines it, and the function through which transformers calls its own compiled copy.
_PLACES = (
    ("torch.nn.attention.flex_attention", "flex_attention"),
    ("transformers.integrations.flex_attention", "compile_friendly_flex_attention"),
)


def functions() -> list[Callable[..., Any]]:
    """The functions whose calls are measured; none before somebody has imported them."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _PLACES)
    return [function for function in found if function is not None]


def _measure(call: Call) -> HeadStats:
    given = call.arguments()
    query, key = given["query"], given["key"]
    return head_stats(
        as_attention_sees(query),
        as_attention_sees(key),
        scale=given.get("scale"),
        enable_gqa=given.get("enable_gqa", False),
        score_mod=_masked(given.get("score_mod"), given.get("block_mask")),
    )


def _masked(score_mod: Callable[..., Tensor] | None, block_mask: Any) -> Callable[..., Tensor] | None:
    """One function for both: what the mask hides becomes -inf."""
    if block_mask is None:
        return score_mod
    visible = block_mask.mask_mod

    def masked(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        logit = score if score_mod is None else score_mod(score, b, h, q_idx, kv_idx)
        return torch.where(visible(b, h, q_idx, kv_idx), logit, -torch.inf)

    return masked


BACK_END = BackEnd("flex_attention", _measure)
