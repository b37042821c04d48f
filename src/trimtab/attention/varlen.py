"""Attention statistics in flash-attn's layouts: heads after tokens, packed sequences, windows, causal at the end.

With L queries and S keys, query i stands at key i + S - L: the last query beside the last key. Causality and
windows count from there. A window (left, right) shows the keys from left before to right after it; below 0 is all.
Shape letters: B batch, H query heads, Hk key heads (H / Hk neighbouring query heads share one), D features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.attention.checks import check_pair, check_softcap, check_vectors, checked_scale
from trimtab.attention.logits import Logits
from trimtab.attention.measure import measured
from trimtab.attention.stats import AttentionStats


def attention_stats_flash(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
) -> AttentionStats:
    """`attention_stats` of one call of `flash_attn_func` (flash-attn 2 or 3), whose options have other names there.

    Args:
        query: (B, L, H, D), floating point.
        key: (B, S, Hk, D).
        is_causal: no key after the query's own position is seen.
        scale: factor on the logits; 1 / sqrt(D) by default.
        softcap: c > 0 turns the scaled logits s into c tanh(s / c); None or 0 is off.
        window: (left, right).
        alibi_slopes: (H,) or (B, H); adds -slope |i + S - L - j| to the logit of query i and key j.

    Returns:
        `AttentionStats`, detached tensors of shape (B, H, L).

    Raises:
        TypeError: query or key is no floating-point tensor, or an option no number.
        ValueError: shapes, devices or options that do not fit together, or no key at all.
    """
    return flash_stats_and_keys(
        query, key, is_causal=is_causal, scale=scale, softcap=softcap, window=window, alibi_slopes=alibi_slopes
    )[0]


def attention_stats_varlen(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
) -> AttentionStats:
    """`attention_stats` of sequences packed one after the other, as `flash_attn_varlen_func` takes them.

    Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1, which see its own keys alone. The
    boundaries are read on the host, so those on another device are waited for.

    Args:
        query: (T, H, D), floating point: all queries of all sequences.
        key: (Tk, Hk, D).
        cu_seqlens_q: B + 1 integers, from 0 up to T, never falling.
        cu_seqlens_k: B + 1 integers, from 0 up to Tk, never falling.
        is_causal: no key after the query's own position in its sequence is seen.
        scale: factor on the logits; 1 / sqrt(D) by default.
        softcap: c > 0 turns the scaled logits s into c tanh(s / c); None or 0 is off.
        window: (left, right).
        alibi_slopes: (H,) or (B, H); adds -slope |i + S - L - j| to the logit of query i and key j of a sequence.

    Returns:
        `AttentionStats`, detached tensors of shape (H, T). Queries of a sequence without keys see nothing.

    Raises:
        TypeError: query or key is no floating-point tensor, or an option no number.
        ValueError: shapes, boundaries, devices or options that do not fit together.
    """
    return varlen_stats_and_keys(
        query,
        key,
        cu_seqlens_q,
        cu_seqlens_k,
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        window=window,
        alibi_slopes=alibi_slopes,
    )[0]


def flash_stats_and_keys(
    query: Tensor, key: Tensor, *, alibi_slopes: Tensor | None = None, **options: Any
) -> tuple[AttentionStats, Tensor]:
    """`attention_stats_flash`, and how many keys each query may see: (B, H, L)."""
    for name, tensor, shape in (("query", query, "(B, L, H, D)"), ("key", key, "(B, S, Hk, D)")):
        check_vectors(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"expected {name} of shape {shape}, got {tuple(tensor.shape)}")
    _check_heads(query, key)
    if len(query) != len(key) or key.shape[1] == 0:
        raise ValueError(
            "expected the same batch in both and at least one key, "
            f"got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    slopes = _checked_slopes(alibi_slopes, len(query), query.shape[2])
    return _stats(query.transpose(1, 2), key.transpose(1, 2), slopes, **options)


def varlen_stats_and_keys(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    *,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> tuple[AttentionStats, Tensor]:
    """`attention_stats_varlen`, and how many keys each query may see: (H, T)."""
    for name, tensor, shape in (("query", query, "(T, H, D)"), ("key", key, "(Tk, Hk, D)")):
        check_vectors(name, tensor)
        if tensor.ndim != 3:
            raise ValueError(f"expected {name} of shape {shape}, got {tuple(tensor.shape)}")
    _check_heads(query, key)
    q_ends = _boundaries("cu_seqlens_q", cu_seqlens_q, len(query))
    k_ends = _boundaries("cu_seqlens_k", cu_seqlens_k, len(key))
    if len(q_ends) != len(k_ends):
        raise ValueError(
            f"expected as many sequences of queries as of keys, got {len(q_ends) - 1} and {len(k_ends) - 1}"
        )
    B, (T, H, _) = len(q_ends) - 1, query.shape
    slopes = _checked_slopes(alibi_slopes, B, H)
    dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
    nothing = {"entropy": 0, "max_logit": -torch.inf, "logsumexp": -torch.inf, "logit_norm": 0}
    stats = AttentionStats(**{name: query.new_full((H, T), value, dtype=dtype) for name, value in nothing.items()})
    seen = query.new_zeros((H, T), dtype=dtype)
    for b in range(B):
        queries, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        if queries.start == queries.stop or keys.start == keys.stop:
            continue
        q, k = query[queries].transpose(0, 1), key[keys].transpose(0, 1)
        its, its_seen = _stats(q, k, None if slopes is None else slopes[b], **options)
        for whole, some in zip((*stats, seen), (*its, its_seen), strict=True):
            whole[:, queries] = some
    return stats, seen


def _stats(
    query: Tensor,
    key: Tensor,
    slopes: Tensor | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: tuple[int, int] | None = None,
) -> tuple[AttentionStats, Tensor]:
    """Of query (B..., H, L, D) and key (B..., Hk, S, D), the last query beside the last key."""
    (H, L, D), S = query.shape[-3:], key.shape[-2]
    check_softcap(softcap or None)
    return measured(
        Logits(
            query,
            key,
            tuple(query.shape[:-1]),
            checked_scale(scale, D),
            range(S - L, S),
            group=H // key.shape[-3],
            window=_sides(window, is_causal),
            softcap=softcap or None,
            slopes=slopes,
        )
    )


def _sides(window: tuple[int, int] | None, is_causal: bool) -> tuple[int | None, int | None]:
    try:
        left, right = (None if side < 0 else int(side) for side in window or (-1, -1))
    except (TypeError, ValueError):
        raise ValueError(f"expected a window (left, right) of integers, below 0 for no limit, got {window!r}") from None
    return left, 0 if is_causal else right


def _check_heads(query: Tensor, key: Tensor) -> None:
    check_pair(query, key)
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            "expected query heads that are a multiple of the key's (last dimension but one), "
            f"got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )


def _checked_slopes(slopes: Tensor | None, B: int, H: int) -> Tensor | None:
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor) or tuple(slopes.shape) not in {(H,), (B, H)}:
        got = tuple(slopes.shape) if isinstance(slopes, Tensor) else type(slopes).__name__
        raise ValueError(f"expected alibi_slopes of shape {(H,)} or {(B, H)}, got {got}")
    return slopes.expand(B, H)


def _boundaries(name: str, ends: Tensor | Sequence[int], total: int) -> list[int]:
    numbers: list[int] = ends.tolist() if isinstance(ends, Tensor) else list(ends)
    integers = isinstance(numbers, list) and all(type(n) is int for n in numbers)
    if not integers or len(numbers) < 2:
        raise ValueError(f"expected {name}: one row of at least two integers, got {ends!r:.80}")
    if numbers[0] != 0 or numbers[-1] != total or numbers != sorted(numbers):
        raise ValueError(f"expected {name} to rise from 0 to the {total} tokens there are, got {numbers!r:.80}")
    return numbers
