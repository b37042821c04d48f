"""Entropy and logit statistics of softmax attention, streamed: no L x S matrix of a long head is ever stored."""

import torch
from torch import Tensor

from trimtab.attention.checks import described
from trimtab.attention.differentiable import differentiable_entropy
from trimtab.attention.logits import ScoreMod
from trimtab.attention.measure import measured
from trimtab.attention.stats import AttentionStats

__all__ = ["AttentionStats", "attention_entropy", "attention_stats"]


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
) -> Tensor:
    """Entropy of every query's attention weights, in nats; differentiable.

    `Ent(A_i) = -sum_j A_ij log A_ij` with `A = softmax(scale * query key^T + mask)`, as in sigma-Reparam
    (Zhai et al., ICML 2023, arXiv 2303.06296). Arguments, shapes and errors are those of `attention_stats`.

    Where gradients are recorded and query, key or a floating-point mask requires one, the entropy has a gradient
    (a regulariser: `loss - 0.01 * attention_entropy(q, k).mean()`), once and not twice. The backward computes the
    logits again, a chunk at a time. A query that sees no key has gradient 0. `score_mod` is not differentiated.

    Returns:
        Tensor of shape (B..., H, L). Its mean over queries, heads and examples is the paper's attention entropy.

    Raises:
        ValueError: also a `score_mod` together with tensors that require a gradient.
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
    inputs = (query, key, attn_mask)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return differentiable_entropy(of)
    return measured(of)[0].entropy


def attention_stats(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
) -> AttentionStats:
    """Entropy, largest logit, log-sum-exp and norm of every query's logits; called like torch's attention.

    Works in float32 (float64 when query or key is float64) whatever the inputs' type, under autocast too, and
    holds a few MB of logits at a time. A query whose keys are all masked has entropy 0; NaN gives NaN.

    Args:
        query: (B..., H, L, D), floating point; (L, D) alone is one head.
        key: (B..., H, S, D); dimensions of size 1 are broadcast. With `enable_gqa`, (B..., H / G, S, D).
        attn_mask: broadcastable to (B..., H, L, S). Boolean: True takes part. Floating: added to the logits.
        is_causal: query i sees keys 0..i (aligned at the top left, as in torch). Not with `attn_mask`.
        scale: factor on the logits; 1 / sqrt(D) by default.
        enable_gqa: each key head serves H / (number of key heads) neighbouring query heads.
        softcap: c > 0 turns the scaled logits s into c tanh(s / c), before any mask, as Gemma 2 does.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)` as in `torch.nn.attention.flex_attention`, on the scaled
            logits, after soft cap and additive mask. What a boolean mask or causality hides stays hidden, and what
            it sets to -inf counts as hidden too. For query of shape (B, H, L, D).

    Returns:
        `AttentionStats`, detached tensors of shape (B..., H, L).

    Raises:
        TypeError: something that should be a (floating-point) tensor is not.
        ValueError: shapes, devices or options that do not fit together, or no key at all.
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
    return measured(of)[0]
