"""The definition of attention entropy, written down directly: slow, to read and to test the fast path."""

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.attention.stats import HIDDEN, AttentionStats


@torch.no_grad()
def attention_stats_reference(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    score_mod: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> AttentionStats:
    """`attention_stats` by its definition, in float64 and with every matrix stored.

    The arguments and shapes are those of `trimtab.attention_stats`; nothing is checked. `score_mod` is called
    once, on whole tensors: (B, H, L, S) logits and index tensors that broadcast to them.

    Returns:
        `AttentionStats` of float64 tensors of shape (B..., H, L).
    """
    query, key = query.double(), key.double()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)  # (B..., H, L, S)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()

    visible = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    if is_causal:
        visible = visible.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        logits, visible = logits + attn_mask, visible & (attn_mask > HIDDEN)
    if score_mod is not None:
        index = torch.meshgrid(*(torch.arange(n, device=logits.device) for n in logits.shape), indexing="ij")
        logits = score_mod(logits, *index)
    if is_causal or (attn_mask is not None and attn_mask.dtype == torch.bool):
        logits = logits.masked_fill(~visible, -torch.inf)
    visible = visible & (logits != -torch.inf)

    max_logit = logits.amax(-1)
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)  # entr(p) = -p log p, 0 at p = 0
    seen = logits.masked_fill(~visible, 0)
    mean = seen.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
    norm = (seen - mean).masked_fill(~visible, 0).norm(dim=-1)
    return AttentionStats(entropy.masked_fill(max_logit == -torch.inf, 0), max_logit, logits.logsumexp(-1), norm)
