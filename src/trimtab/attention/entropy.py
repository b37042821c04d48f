"""Entropy and logit statistics of softmax attention, streamed: no L x S matrix of a long head is ever stored.

Shape letters: B batch, H query heads, L queries, S keys, D features; G query heads share one key head, and N
counts the key heads of all examples.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Logits held at once: 4 MB in float32, enough for an efficient matrix product and little beside any model.
_LOGITS_AT_ONCE = 2**20

# Logits further than this below their row's maximum, -inf among them, count as this far below it: e^-87 is
# nothing beside the 1 of the maximum, even in float64, yet a normal float32: no 0 * -inf, no slow denormals.
_FAR_BELOW = -87.0


class AttentionStats(NamedTuple):
    """What `attention_stats` returns: one number per query, each tensor of shape (B..., H, L).

    Attributes:
        entropy: of the attention weights in nats, between 0 and the logarithm of the number of keys seen.
        max_logit: the largest logit (scaled, mask added); -inf where every key is masked.
        logsumexp: logarithm of the softmax's denominator; -inf where every key is masked.
    """

    entropy: Tensor
    max_logit: Tensor
    logsumexp: Tensor


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Entropy of every query's attention weights, in nats.

    `Ent(A_i) = -sum_j A_ij log A_ij` with `A = softmax(scale * query key^T + mask)`, as in sigma-Reparam
    (Zhai et al., ICML 2023, arXiv 2303.06296). Arguments, shapes and errors are those of `attention_stats`.

    Returns:
        Tensor of shape (B..., H, L), detached: a measurement, not a regulariser. Its mean over queries, heads
        and examples is the paper's attention entropy.
    """
    return attention_stats(
        query, key, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    ).entropy


@torch.no_grad()
def attention_stats(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionStats:
    """Entropy, largest logit and log-sum-exp of every query's attention; called like torch's attention.

    Works in float32 (float64 when query or key is float64) whatever the inputs' type, under autocast too, and
    holds about a million logits at a time. A query whose keys are all masked has entropy 0; NaN gives NaN.

    Args:
        query: (B..., H, L, D), floating point; (L, D) alone is one head.
        key: (B..., H, S, D); dimensions of size 1 are broadcast. With `enable_gqa`, (B..., H / G, S, D).
        attn_mask: broadcastable to (B..., H, L, S). Boolean: True takes part. Floating: added to the logits.
        is_causal: query i sees keys 0..i (aligned at the top left, as in torch). Not with `attn_mask`.
        scale: factor on the logits; 1 / sqrt(D) by default.
        enable_gqa: each key head serves H / (number of key heads) neighbouring query heads.

    Returns:
        `AttentionStats`, detached tensors of shape (B..., H, L).

    Raises:
        TypeError: something that should be a (floating-point) tensor is not.
        ValueError: shapes, devices or options that do not fit together, or no key at all.
    """
    shape, group = _check(query, key, attn_mask, is_causal, enable_gqa)
    (L, D), S = query.shape[-2:], key.shape[-2]
    dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
    scale = D**-0.5 if scale is None else scale

    lead = shape[:-1] or (1,)  # (B..., H)
    key_lead = (*lead[:-1], lead[-1] // group)
    query, key = query.expand(*lead, L, D), key.expand(*key_lead, S, D)
    mask = None if attn_mask is None else attn_mask.expand(*lead, L, S)

    N = math.prod(key_lead)
    heads = max(1, _LOGITS_AT_ONCE // max(1, group * L * S, S * D))
    rows = max(1, _LOGITS_AT_ONCE // (heads * group * S))
    stats = AttentionStats(*(query.new_empty(N * group, L, dtype=dtype) for _ in AttentionStats._fields))
    with torch.autocast(query.device.type, enabled=False), _full_precision(query.device.type):
        for n in range(0, N, heads):
            key_heads = slice(n, min(n + heads, N))
            query_heads = slice(n * group, key_heads.stop * group)
            key_NSD = _heads(key, key_heads).to(dtype)
            for i in range(0, L, rows):
                chunk = slice(i, min(i + rows, L))
                seen = min(chunk.stop, S) if is_causal else S
                # Query heads that share keys become rows of one product: no key is copied per query head.
                query_rows = _heads(query, query_heads, chunk).to(dtype).reshape(key_NSD.shape[0], -1, D)
                logits = (query_rows @ key_NSD[:, :seen].mT).mul_(scale).view(-1, chunk.stop - i, seen)
                if is_causal:
                    logits.masked_fill_(_later(chunk, seen, logits.device), -torch.inf)
                elif mask is not None:
                    _mask_(logits, _heads(mask, query_heads, chunk))
                for whole, numbers in zip(stats, _row_stats_(logits), strict=True):
                    whole[query_heads, chunk] = numbers
    return AttentionStats(*(numbers.view(shape) for numbers in stats))


def _heads(tensor: Tensor, heads: slice, rows: slice = slice(None)) -> Tensor:
    """Copy some heads (counted over all leading dimensions) and some rows of each: (heads, rows, ...)."""
    flat = torch.arange(heads.start, heads.stop, device=tensor.device)
    index: tuple[Tensor | slice, ...] = (*torch.unravel_index(flat, tensor.shape[:-2]), rows)
    return tensor[index]


def _mask_(logits: Tensor, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        logits.masked_fill_(~mask, -torch.inf)
    else:
        logits.add_(mask)


def _later(queries: slice, num_keys: int, device: torch.device) -> Tensor:
    """True where a key comes after the query: shape (queries, num_keys)."""
    query_index = torch.arange(queries.start, queries.stop, device=device)
    return torch.arange(num_keys, device=device) > query_index[:, None]


def _row_stats_(logits: Tensor) -> AttentionStats:
    """Statistics of each row of logits, which are overwritten.

    With m the maximum, l = sum e^(s - m) and t = sum e^(s - m) (s - m): H = log l - t / l. Neither term is
    negative, so nothing cancels, whatever the size of the logits.
    """
    max_logit = logits.amax(-1)
    nothing_seen = max_logit == -torch.inf
    shifted = logits.sub_(max_logit.masked_fill(nothing_seen, 0).unsqueeze(-1)).clamp_(min=_FAR_BELOW)
    weight = shifted.exp()
    l = weight.sum(-1)  # noqa: E741 - the letter of the formula
    t = weight.mul_(shifted).sum(-1)
    entropy = (l.log() - t / l).masked_fill(nothing_seen, 0)
    return AttentionStats(entropy, max_logit, max_logit + l.log())


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Keep matrix products in true float32, also where TF32 or bfloat16 are allowed for speed."""
    backend: Any = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device_type)
    matmul = getattr(backend, "matmul", None)
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name, exact)
    if before in (exact, "none"):
        yield
        return
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _check(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> tuple[tuple[int, ...], int]:
    """Refuse what does not fit; return the result's shape (B..., H, L) and the query heads per key head."""
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
        if tensor.is_nested or not tensor.is_floating_point():
            kind = "nested" if tensor.is_nested else str(tensor.dtype)
            raise TypeError(f"expected {name} to be a dense, floating-point tensor, got a {kind} one")
        if tensor.ndim < 2:
            raise ValueError(f"expected {name} of shape (B..., H, length, D), got {tuple(tensor.shape)}")
    shapes = f"query {tuple(query.shape)} and key {tuple(key.shape)}"
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise ValueError(f"expected query and key with the same, positive D (last dimension), got {shapes}")
    if key.shape[-2] == 0:
        raise ValueError(f"expected at least one key, got {shapes}: attention over no keys has no entropy")
    if query.device != key.device:
        raise ValueError(f"expected query and key on one device, got {query.device} and {key.device}")

    group = _heads_per_key_head(query, key) if enable_gqa else 1
    key_lead = key.shape[:-2] if group == 1 else (*key.shape[:-3], query.shape[-3])
    try:
        lead = torch.broadcast_shapes(query.shape[:-2], key_lead)
    except RuntimeError:
        hint = "" if enable_gqa else "; for fewer key heads than query heads pass enable_gqa=True"
        raise ValueError(f"expected the same batch and heads in both, got {shapes}{hint}") from None
    if attn_mask is not None:
        _check_mask(attn_mask, (*lead, query.shape[-2], key.shape[-2]), is_causal, query.device)
    return (*lead, query.shape[-2]), group


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
    try:
        fits = attn_mask.ndim >= 2 and torch.broadcast_shapes(attn_mask.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"expected attn_mask broadcastable to (B..., H, L, S) = {shape}, got {tuple(attn_mask.shape)}")
    if attn_mask.device != device:
        raise ValueError(f"expected attn_mask on {device} like the query, got {attn_mask.device}")
