"""What is measured of every attention head.

Shape letters: B batch, H heads, L queries, S keys, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.attention import attention_stats

# An additive mask hides a key by -inf, by the dtype's smallest number, or by -1e4 as BERT does. All count as hidden.
_HIDDEN = -1e4


class HeadStats(NamedTuple):
    """One number per attention head, each tensor of shape (H,), detached.

    Attributes:
        entropy: mean attention entropy over batch and queries, nats.
        normalized: mean of the entropy divided by the logarithm of the number of keys that the query may see,
            0 to 1. Queries that see fewer than two keys have no choice and are left out; NaN when all are.
        max_logit: largest attention logit (scaled, mask added).
    """

    entropy: Tensor
    normalized: Tensor
    max_logit: Tensor


@torch.no_grad()
def head_stats(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> HeadStats:
    """Statistics of each head of one attention call; arguments and errors as for `trimtab.attention_stats`.

    A query of shape (B..., H, L, D) has H heads; one of shape (B, L, D) or (L, D) is taken as a single head.
    """
    stats = attention_stats(query, key, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    keys = visible_keys(query.shape[-2], key.shape[-2], attn_mask, is_causal).to(stats.entropy)
    keys = keys.expand(stats.entropy.shape)
    choice = keys >= 2
    share = torch.where(choice, stats.entropy / keys.clamp(min=2).log(), 0)
    return HeadStats(
        entropy=_per_head(stats.entropy).mean(1),
        normalized=_per_head(share).sum(1) / _per_head(choice).sum(1),
        max_logit=_per_head(stats.max_logit).amax(1),
    )


def visible_keys(L: int, S: int, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """How many of S keys each of L queries may see: integers that broadcast to (B..., H, L).

    A key whose additive mask is -1e4 or lower counts as hidden.
    """
    if is_causal:
        return torch.arange(1, L + 1).clamp(max=S)
    if attn_mask is None:
        return torch.tensor([S])
    seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > _HIDDEN
    return seen.expand(*seen.shape[:-1], S).sum(-1)


def _per_head(numbers: Tensor) -> Tensor:
    """(B..., H, L) as (H, everything else)."""
    return numbers.movedim(-2, 0).flatten(1) if numbers.ndim >= 3 else numbers.reshape(1, -1)


def merge(calls: list[HeadStats]) -> HeadStats:
    """One `HeadStats` for several calls: entropies are averaged, each call with the same weight; logits are maxed."""
    return HeadStats(
        entropy=torch.stack([call.entropy for call in calls]).mean(0),
        normalized=torch.stack([call.normalized for call in calls]).mean(0),
        max_logit=torch.stack([call.max_logit for call in calls]).amax(0),
    )
