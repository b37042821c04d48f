"""The tap on flash-attn: `flash_attn` (version 2) and `flash_attn_interface` (version 3), packed or not, varlen or not.

Both are looked up among what the program has imported, never imported here. So are the kernels of the same names that
transformers fetches from the Hugging Face hub where flash-attn is not installed.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from trimtab.attention.varlen import flash_stats_and_keys, varlen_stats_and_keys
from trimtab.watch.signals import HeadStats
from trimtab.watch.signals.heads import per_head_stats
from trimtab.watch.taps.backend import BackEnd, Call, NotMeasuredError

_MODULES = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface")
_FUNCTIONS = tuple(
    f"flash_attn_{varlen}{packed}func" for varlen in ("", "varlen_") for packed in ("", "qkvpacked_", "kvpacked_")
)
# Where transformers keeps the functions it calls: flash-attn's, or those of a kernel from the Hugging Face hub.
_IN_TRANSFORMERS = tuple(
    ("transformers.modeling_flash_attention_utils", name) for name in ("_flash_fn", "_flash_varlen_fn")
)
# Options that change which keys take part, or their values, in a way that is not followed here.
_NOT_FOLLOWED = (
    "block_table",
    "page_table",
    "cache_seqlens",
    "seqused_q",
    "seqused_k",
    "qv",
    "q_v",
    "q_descale",
    "k_descale",
    "attention_chunk",
    "learnable_sink",
    "s_aux",
    "mask_mod",
    "score_mod",
)


def functions() -> list[Callable[..., Any]]:
    """The functions whose calls are measured; none before somebody has imported flash-attn."""
    names = [(module, name) for module in _MODULES for name in _FUNCTIONS]
    found = [getattr(sys.modules.get(module), name, None) for module, name in (*names, *_IN_TRANSFORMERS)]
    # For some devices transformers has functions of its own there, of other names and meanings.
    return [function for function in found if callable(function) and getattr(function, "__name__", "") in _FUNCTIONS]


def _measure(call: Call) -> HeadStats:
    given = call.arguments()
    for option in _NOT_FOLLOWED:
        value = given.get(option)
        if value is not None and not (isinstance(value, int) and value == 0):
            raise NotMeasuredError(f"it was called with {option}")
    options: dict[str, Any] = {
        "is_causal": bool(given.get("causal")),
        "scale": given.get("softmax_scale"),
        "softcap": given.get("softcap"),
        "window": tuple(-1 if side is None else side for side in given.get("window_size") or (-1, -1)),
        "alibi_slopes": given.get("alibi_slopes"),
    }
    query, key = _unpacked(given)
    if "cu_seqlens_q" in given:
        ends = (given["cu_seqlens_q"], given["cu_seqlens_k"])
    elif "cu_seqlens" in given:
        ends = (given["cu_seqlens"], given["cu_seqlens"])
    else:
        return per_head_stats(*flash_stats_and_keys(query, key, **options))
    return per_head_stats(*varlen_stats_and_keys(query, key, *ends, **options))


def _unpacked(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Query (..., H, D) and key (..., Hk, D), out of one tensor, two or three."""
    if "qkv" in given:
        query, key, _ = given["qkv"].detach().unbind(-3)
        return query, key
    query = given["q"].detach()
    return query, given["kv"].detach().select(-3, 0) if "kv" in given else given["k"].detach()


BACK_END = BackEnd("flash-attn", _measure)
