"""The tap on `torch.nn.functional.scaled_dot_product_attention`, whoever calls it under whatever name."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trimtab.watch.signals import HeadStats, head_stats
from trimtab.watch.taps.backend import BackEnd, Call, as_attention_sees


def functions() -> list[Callable[..., Any]]:
    """The functions whose calls are measured."""
    return [F.scaled_dot_product_attention]


def _measure(call: Call) -> HeadStats:
    return _stats(*call.args, **call.kwargs)


def _stats(  # the signature of torch's function, which cannot be asked for its own
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> HeadStats:
    query, key = as_attention_sees(query), as_attention_sees(key)
    if max(query.ndim, key.ndim) == 3 and not enable_gqa:  # (B, L, D), a single head
        query, key = query.unsqueeze(-3), key.unsqueeze(-3)
        attn_mask = attn_mask if attn_mask is None else attn_mask.unsqueeze(-3)
    return head_stats(
        query,
        key,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


BACK_END = BackEnd("scaled_dot_product_attention", _measure)
