"""The definition of attention entropy, written down directly: slow, to read and to test the fast path."""

import torch
from torch import Tensor

from trimtab.attention.entropy import AttentionStats


@torch.no_grad()
def attention_stats_reference(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionStats:
    """`attention_stats` by its definition, in float64 and with every matrix stored.

    The arguments and shapes are those of `trimtab.attention_stats`; nothing is checked.

    Returns:
        `AttentionStats` of float64 tensors of shape (B..., H, L).
    """
    query, key = query.double(), key.double()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)  # (B..., H, L, S)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, device=logits.device).masked_fill(~attn_mask, -torch.inf)
    if attn_mask is not None:
        logits = logits + attn_mask

    max_logit = logits.amax(-1)
    nothing_seen = max_logit == -torch.inf
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)  # entr(p) = -p log p, 0 at p = 0
    return AttentionStats(entropy.masked_fill(nothing_seen, 0), max_logit, logits.logsumexp(-1))
