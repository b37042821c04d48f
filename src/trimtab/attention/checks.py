"""What the attention functions accept: refused clearly, or described as `Logits`."""

import math
from collections.abc import Sequence
from typing import SupportsFloat

import torch
from torch import Tensor

from trimtab.attention.logits import Logits, ScoreMod


def described(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
) -> Logits:
    """Refuse what does not fit, with the errors that `attention_stats` documents; describe the rest."""
    lead, group = _check_heads(query, key, enable_gqa)
    if attn_mask is not None:
        _check_mask(attn_mask, (*lead, query.shape[-2], key.shape[-2]), is_causal, query.device)
    check_softcap(softcap)
    if score_mod is not None:
        _check_score_mod(score_mod, lead)
    return Logits(
        query,
        key,
        (*lead, query.shape[-2]),
        checked_scale(scale, query.shape[-1]),
        range(query.shape[-2]),
        group=group,
        mask=attn_mask,
        window=(None, 0) if is_causal else (None, None),
        softcap=softcap,
        score_mod=score_mod,
    )


def check_softcap(softcap: float | None) -> None:
    """Refuse a soft cap that is not a positive number."""
    if softcap is not None and not 0 < _number("softcap", softcap) < math.inf:
        raise ValueError(f"expected softcap > 0 and finite, or None for no cap, got {softcap}")


def checked_scale(scale: float | None, D: int) -> float:
    """The factor on the logits of vectors of D features; refuse what is no number."""
    return D**-0.5 if scale is None else _number("scale", scale)


def _number(name: str, value: object) -> float:
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"expected {name} to be a number or None, got {value!r:.80}")
    return float(value)


def check_pair(query: Tensor, key: Tensor) -> None:
    """Refuse vectors of two lengths, or on two devices."""
    shapes = f"query {tuple(query.shape)} and key {tuple(key.shape)}"
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise ValueError(f"expected query and key with the same, positive D (last dimension), got {shapes}")
    if query.device != key.device:
        raise ValueError(f"expected query and key on one device, got {query.device} and {key.device}")


def check_vectors(name: str, tensor: object) -> None:
    """Refuse what is no dense floating-point tensor of vectors."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested or not tensor.is_floating_point():
        kind = "nested" if tensor.is_nested else str(tensor.dtype)
        raise TypeError(f"expected {name} to be a dense, floating-point tensor, got a {kind} one")


def _check_heads(query: Tensor, key: Tensor, enable_gqa: bool) -> tuple[tuple[int, ...], int]:
    """Return the leading dimensions (B..., H), none for matrices, and the query heads per key head."""
    for name, tensor in (("query", query), ("key", key)):
        check_vectors(name, tensor)
        if tensor.ndim < 2:
            raise ValueError(f"expected {name} of shape (B..., H, length, D), got {tuple(tensor.shape)}")
    check_pair(query, key)
    shapes = f"query {tuple(query.shape)} and key {tuple(key.shape)}"
    if key.shape[-2] == 0:
        raise ValueError(f"expected at least one key, got {shapes}: attention over no keys has no entropy")

    group = _heads_per_key_head(query, key) if enable_gqa else 1
    key_lead = key.shape[:-2] if group == 1 else (*key.shape[:-3], query.shape[-3])
    lead = _broadcast(query.shape[:-2], key_lead)
    if lead is None:
        hint = "" if enable_gqa else "; for fewer key heads than query heads pass enable_gqa=True"
        raise ValueError(f"expected the same batch and heads in both, got {shapes}{hint}")
    return lead, group


def _broadcast(one: Sequence[int], two: Sequence[int]) -> tuple[int, ...] | None:
    """The shape that two shapes broadcast to, or None. torch's own function takes half a second when first called."""
    ones = (1,) * (len(one) - len(two))
    others = (1,) * (len(two) - len(one))
    pairs = list(zip((*others, *one), (*ones, *two), strict=True))
    return tuple(b if a == 1 else a for a, b in pairs) if all(a == b or 1 in (a, b) for a, b in pairs) else None


def _heads_per_key_head(query: Tensor, key: Tensor) -> int:
    if query.ndim < 3 or key.ndim < 3 or key.shape[-3] == 0 or query.shape[-3] % key.shape[-3]:
        raise ValueError(
            "expected, with enable_gqa, query (B..., H, L, D) whose H is a multiple of the key's heads, "
            f"got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    return query.shape[-3] // key.shape[-3]


def _check_mask(attn_mask: Tensor, shape: tuple[int, ...], is_causal: bool, device: torch.device) -> None:
    if is_causal:
        raise ValueError("got both attn_mask and is_causal=True: put the causal part into the mask, or drop one")
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"expected attn_mask to be a tensor or None, got {type(attn_mask).__name__}")
    # Known by name, because its module is heavy to import. Its numbers are never set: torch reads its kind alone.
    if type(attn_mask).__name__ == "CausalBias":
        raise TypeError("expected attn_mask as a plain tensor, got a CausalBias: pass the boolean mask it stands for")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(
            f"expected attn_mask boolean (True takes part) or floating point (added), got {attn_mask.dtype}"
        )
    if attn_mask.ndim < 2 or _broadcast(attn_mask.shape, shape) != tuple(shape):
        raise ValueError(f"expected attn_mask broadcastable to (B..., H, L, S) = {shape}, got {tuple(attn_mask.shape)}")
    if attn_mask.device != device:
        raise ValueError(f"expected attn_mask on {device} like the query, got {attn_mask.device}")


def _check_score_mod(score_mod: ScoreMod, lead: tuple[int, ...]) -> None:
    if not callable(score_mod):
        raise TypeError(f"expected score_mod(score, b, h, q_idx, kv_idx), a function, got {type(score_mod).__name__}")
    if len(lead) != 2:
        raise ValueError(f"expected query of shape (B, H, L, D) for score_mod, got leading dimensions {lead}")
