"""Attention entropy of very long sequences, estimated from some of the queries."""

from dataclasses import replace
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from trimtab.attention.checks import described
from trimtab.attention.logits import ScoreMod
from trimtab.attention.measure import measured


class SampledEntropy(NamedTuple):
    """An estimate of the mean attention entropy over the queries of each head, in nats.

    Attributes:
        mean: of shape (B..., H).
        standard_error: of the mean, of the same shape; 0 when every query was taken.
    """

    mean: Tensor
    standard_error: Tensor


@torch.no_grad()
def attention_entropy_sampled(
    query: Tensor,
    key: Tensor,
    *,
    num_queries: int,
    generator: torch.Generator,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
) -> SampledEntropy:
    """Estimate `attention_entropy(...).mean(-1)` from a random subset of queries, the same in every head.

    The queries are drawn without replacement, so the mean is unbiased, and with n of L queries and s their
    standard deviation its standard error is `s / sqrt(n) * sqrt(1 - n / L)` (Cochran, Sampling Techniques, 1977,
    eq. 2.20). The cost is n / L of the whole.

    Args:
        query: (B..., H, L, D), floating point.
        key: (B..., H, S, D), or fewer heads with `enable_gqa`.
        num_queries: n, from 2 to L (or 1 if there is one query).
        generator: where the random numbers come from. It has to be given: measuring never draws from the global one.
        attn_mask: as for `attention_stats`, like all that follow.
        is_causal: query i sees keys 0..i.
        scale: factor on the logits.
        enable_gqa: a key head serves several query heads.
        softcap: c > 0 for logits c tanh(s / c).
        score_mod: as in flex_attention; it is given the queries' true indices.

    Returns:
        `SampledEntropy`, detached.

    Raises:
        TypeError: the generator is none, num_queries is no integer, or as for `attention_stats`.
        ValueError: too few or too many queries, or as for `attention_stats`.
    """
    of = described(
        query,
        key,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
        score_mod=score_mod,
    )
    L = query.shape[-2]
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"expected a torch.Generator of its own, got {type(generator).__name__}")
    if not isinstance(num_queries, SupportsIndex):
        raise TypeError(f"expected num_queries to be an integer, got {num_queries!r:.80}")
    if not min(2, L) <= num_queries <= L or L == 0:
        raise ValueError(f"expected num_queries between 2 and the {L} there are, got {num_queries}")

    drawn = torch.randperm(L, generator=generator, device=generator.device)[:num_queries].sort().values
    rows = drawn.to(query.device)
    some = replace(
        of,
        query=query.index_select(-2, rows),
        mask=attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask.index_select(-2, rows),
        positions=drawn.tolist(),
        shape=(*of.shape[:-1], num_queries),
    )
    entropy = measured(some)[0].entropy
    mean = entropy.mean(-1)
    if num_queries == L:
        return SampledEntropy(mean, torch.zeros_like(mean))
    return SampledEntropy(mean, entropy.std(-1) * ((1 - num_queries / L) / num_queries) ** 0.5)
