"""What is measured of every attention head.

Shape letters: B batch, H heads, L queries, S keys, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.attention.bound import unchecked_lower_bound
from trimtab.attention.entropy import AttentionStats, stats_and_keys
from trimtab.attention.logits import ScoreMod


class HeadStats(NamedTuple):
    """One number per attention head, each tensor of shape (H,), detached.

    Attributes:
        entropy: mean attention entropy over batch and queries, nats. Queries that may see no key are left out here
            and in the other means; NaN when all are.
        normalized: mean of the entropy divided by the logarithm of the number of keys that the query may see,
            0 to 1. Queries that see a single key have no choice and are left out too.
        max_logit: largest attention logit (scaled, mask added).
        logit_norm: mean norm of a row of logits about its mean, over the keys that the query may see.
        bound: mean of `entropy_lower_bound(logit_norm, number of those keys)`, nats: never above `entropy`.
    """

    entropy: Tensor
    normalized: Tensor
    max_logit: Tensor
    logit_norm: Tensor
    bound: Tensor


def head_stats(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
) -> HeadStats:
    """Statistics of each head of one attention call; arguments and errors as for `trimtab.attention_stats`.

    A query of shape (B..., H, L, D) has H heads; one of shape (B, L, D) or (L, D) is taken as a single head.
    """
    return per_head_stats(*stats_and_keys(query, key, attn_mask, is_causal, scale, enable_gqa, softcap, score_mod))


@torch.no_grad()
def per_head_stats(stats: AttentionStats, keys: Tensor) -> HeadStats:
    """Summarize the queries of every head.

    Args:
        stats: of shape (B..., H, L); (B, L) or (L,) is taken as a single head.
        keys: how many keys each query may see, broadcastable to that shape.
    """
    keys = keys.to(stats.entropy).expand(stats.entropy.shape)
    sees, choice = keys >= 1, keys >= 2
    share = stats.entropy / keys.clamp(min=2).log()
    bound = unchecked_lower_bound(stats.logit_norm, keys)
    numbers = torch.stack([stats.entropy, share, stats.logit_norm, bound])
    counted = torch.stack([sees, choice, sees, sees])
    means = _per_head(torch.where(counted, numbers, 0)).sum(-1) / _per_head(counted).sum(-1)
    entropy, normalized, logit_norm, bound = means.unbind()
    return HeadStats(entropy, normalized, _per_head(stats.max_logit[None])[0].amax(-1), logit_norm, bound)


def _per_head(numbers: Tensor) -> Tensor:
    """(some, B..., H, L) as (some, H, everything else)."""
    if numbers.ndim < 4:
        return numbers.reshape(len(numbers), 1, -1)
    return numbers.movedim(-2, 1).flatten(2)


def merge(calls: list[HeadStats]) -> HeadStats:
    """One `HeadStats` for several calls: means are averaged, each call with the same weight; logits are maxed."""
    if len(calls) == 1:
        return calls[0]
    mean = HeadStats(*(torch.stack(numbers).mean(0) for numbers in zip(*calls, strict=True)))
    return mean._replace(max_logit=torch.stack([call.max_logit for call in calls]).amax(0))
