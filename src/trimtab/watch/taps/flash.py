"""The tap on flash-attn: `flash_attn` (version 2) and `flash_attn_interface` (version 3), packed or not, varlen or not.

Both are looked up among what the program has imported, never imported here.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.attention.stats import AttentionStats
from trimtab.attention.varlen import attention_stats_flash, attention_stats_varlen
from trimtab.watch.signals import HeadStats
from trimtab.watch.signals.heads import per_head_stats
from trimtab.watch.taps.backend import BackEnd, Call, NotMeasuredError

_MODULES = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface")
_FUNCTIONS = tuple(
    f"flash_attn_{varlen}{packed}func" for varlen in ("", "varlen_") for packed in ("", "qkvpacked_", "kvpacked_")
)
# Options that change which keys take part, or their values, in a way that is not followed here.
_NOT_FOLLOWED = (
    "block_table",
    "seqused_q",
    "seqused_k",
    "qv",
    "q_descale",
    "k_descale",
    "attention_chunk",
    "learnable_sink",
)


def functions() -> list[Callable[..., Any]]:
    """The functions whose calls are measured; none before somebody has imported flash-attn."""
    modules = [sys.modules[name] for name in _MODULES if name in sys.modules]
    found = (getattr(module, name, None) for module in modules for name in _FUNCTIONS)
    return [function for function in found if function is not None]


def _measure(call: Call) -> HeadStats:
    name = call.function.__name__
    given = call.arguments()
    for option in _NOT_FOLLOWED:
        value = given.get(option)
        if value is not None and not (isinstance(value, int) and value == 0):
            raise NotMeasuredError(f"it was called with {option}")
    query, key = _unpacked(given)
    causal, window = bool(given.get("causal")), tuple(given.get("window_size") or (-1, -1))
    if causal:
        window = (window[0], 0)
    softcap = given.get("softcap") or None
    if "varlen" not in name:
        stats = attention_stats_flash(
            query,
            key,
            causal=causal,
            window_size=window,
            softcap=softcap,
            softmax_scale=given.get("softmax_scale"),
            alibi_slopes=given.get("alibi_slopes"),
        )
        L, S = query.shape[1], key.shape[1]
        return per_head_stats(stats, _visible(torch.arange(L, device=query.device), L, S, window))
    q_ends = given["cu_seqlens_q"] if "cu_seqlens_q" in given else given["cu_seqlens"]
    k_ends = given["cu_seqlens_k"] if "cu_seqlens_k" in given else given["cu_seqlens"]
    stats = attention_stats_varlen(
        query,
        key,
        q_ends,
        k_ends,
        is_causal=causal,
        scale=given.get("softmax_scale"),
        softcap=softcap,
        window=window,
        alibi_slopes=given.get("alibi_slopes"),
    )
    L, S = q_ends.diff(), k_ends.diff()
    index = torch.arange(len(query), device=query.device) - q_ends[:-1].repeat_interleave(L)
    keys = _visible(index, L.repeat_interleave(L), S.repeat_interleave(L), window)
    return per_head_stats(AttentionStats(*(numbers[None] for numbers in stats)), keys)  # (1, H, T): heads, not batch


def _unpacked(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Query (..., H, D) and key (..., Hk, D), out of one tensor, two or three."""
    if "qkv" in given:
        query, key, _ = given["qkv"].detach().unbind(-3)
        return query, key
    query = given["q"].detach()
    return query, given["kv"].detach().select(-3, 0) if "kv" in given else given["k"].detach()


def _visible(index: Tensor, L: Tensor | int, S: Tensor | int, window: tuple[int, ...]) -> Tensor:
    """How many keys query `index` of L sees of S: the last query and the last key stand side by side."""
    left, right = window
    at = index + S - L
    first = (at - left if left >= 0 else torch.zeros_like(at)).clamp(min=0)
    end = (at + right + 1 if right >= 0 else torch.zeros_like(at) + S).clamp(max=S)
    return (end - first).clamp(min=0)


BACK_END = BackEnd("flash-attn", _measure)
