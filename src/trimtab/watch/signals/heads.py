"""What is measured of every attention head.

Shape letters: B batch, H heads, L queries, S keys, D features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.attention.bound import unchecked_lower_bound
from trimtab.attention.checks import described
from trimtab.attention.measure import measured
from trimtab.attention.stats import AttentionStats


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


def head_stats(query: Tensor, key: Tensor, **options: Any) -> HeadStats:
    """Statistics of each head of one attention call; arguments, options and errors are those of `attention_stats`."""
    return per_head_stats(*measured(described(query, key, **options)))


@torch.no_grad()
def per_head_stats(stats: AttentionStats, keys: Tensor) -> HeadStats:
    """Summarize the queries of every head.

    Args:
        stats: of shape (B..., H, L); (L,) alone is one head.
        keys: how many keys each query may see, broadcastable to that shape.
    """
    if not stats.entropy.numel():  # an empty batch: heads, and no number of any
        heads = stats.entropy.shape[-2] if stats.entropy.ndim > 1 else 1
        nothing = stats.entropy.new_full((heads,), torch.nan)
        return HeadStats(*(nothing for _ in HeadStats._fields))
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
    if numbers.ndim == 2:
        return numbers.unsqueeze(1)
    return numbers.movedim(-2, 1).flatten(2)


def merge(calls: list[HeadStats]) -> HeadStats:
    """One `HeadStats` for several calls: means are averaged, each call with the same weight; logits are maxed.

    A call in which a head had no number (no query had a choice) is left out; NaN of logits that are NaN stays.
    """
    if len(calls) == 1:
        return calls[0]
    fields = HeadStats(*(torch.stack(numbers) for numbers in zip(*calls, strict=True)))
    broken = (fields.max_logit.isnan() & fields.entropy.isnan()).any(0)
    mean = HeadStats(*(torch.where(broken, torch.nan, numbers.nanmean(0)) for numbers in fields))
    return mean._replace(max_logit=fields.max_logit.amax(0))
