"""Attention whose logits are capped softly."""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cap(logits: Tensor, softcap: float) -> Tensor:
    """Return ``softcap · tanh(logits / softcap)``; its derivative is ``1 - tanh²(logits / softcap)``."""
    return softcap * torch.tanh(logits / softcap)


def softcapped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend with logits ``c tanh(s / c)`` in place of ``s = scale query key^T``; masks are added after that.

    Gemma Team, "Gemma 2", 2024, arXiv 2408.00118, section 2. Logits and weights are stored for the
    backward: two or three tensors of (B, H, L, S), where a fused kernel stores none.

    Args:
        query: (B..., H, L, D).
        key: (B..., H, S, D), or fewer heads with `enable_gqa`.
        value: (B..., H, S, E), likewise.
        softcap: c > 0; no logit is larger than it.
        attn_mask: broadcastable to (B..., H, L, S); boolean (True takes part) or floating (added).
        dropout_p: share of the weights that is dropped.
        is_causal: whether query i sees keys up to i only.
        scale: 1 / sqrt(D) by default.
        enable_gqa: whether query heads share key heads, as in `torch.nn.functional.scaled_dot_product_attention`.

    Returns:
        (B..., H, L, E), and the weights (B..., H, L, S), after dropout.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    # In half precision a large logit would lose its last digits to the cap.
    logits = soft_cap((query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)), softcap)
    if is_causal:
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~causal, -torch.inf)
    blind = None  # queries that see no key at all attend to nothing, as in torch's function
    if attn_mask is not None:
        hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
        blind = hidden.all(-1, keepdim=True)
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(hidden & ~blind, -torch.inf)
        else:
            logits = logits + attn_mask.masked_fill(blind, 0)
    weights = logits.softmax(-1).to(value.dtype)
    weights = F.dropout(weights if blind is None else weights.masked_fill(blind, 0), dropout_p)
    return weights @ value, weights
