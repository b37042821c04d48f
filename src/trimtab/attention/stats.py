"""Statistics of rows of attention logits: their definition, and the few passes that compute them."""

from typing import NamedTuple

import torch
from torch import Tensor

# An additive mask hides a key by -inf, by the dtype's smallest number, or by -1e4 as BERT does. All count as hidden.
HIDDEN = -1e4

# Logits further than this below their row's maximum, -inf among them, count as this far below it: e^-70 is
# nothing beside the 1 of the maximum, even in float64, yet a normal float32, even divided by a million keys:
# no 0 * -inf, no slow denormals.
FAR_BELOW = -70.0


class AttentionStats(NamedTuple):
    """What `attention_stats` returns: one number per query, each tensor of shape (B..., H, L).

    Attributes:
        entropy: of the attention weights in nats, between 0 and the logarithm of the number of keys seen.
        max_logit: the largest logit (scaled, capped, mask added); -inf where every key is masked.
        logsumexp: logarithm of the softmax's denominator; -inf where every key is masked.
        logit_norm: Euclidean norm of the row of logits about its mean, both over the keys that the query may see
            (an additive mask of -1e4 or lower hides a key): the S of `entropy_lower_bound`. 0 where none is seen.
    """

    entropy: Tensor
    max_logit: Tensor
    logsumexp: Tensor
    logit_norm: Tensor


class RowSums(NamedTuple):
    """What the passes over a row of logits s with weights A leave: tensors of one shape, one number per row.

    Attributes:
        maximum: m, the largest logit.
        top: the largest weight, which is e^m over the softmax's denominator.
        below: sum of A (s - m).
        norm: of the row about its mean, over the keys that are seen.
        keys: how many these are.
    """

    maximum: Tensor
    top: Tensor
    below: Tensor
    norm: Tensor
    keys: Tensor


def row_sums_(logits: Tensor, hidden: Tensor | None, start: int, scratch: Tensor, into: RowSums) -> None:
    """Write the sums of each row of logits, which are overwritten.

    Args:
        logits: (heads, rows, keys), with -inf wherever a boolean mask hides a key.
        hidden: True where the query may not see the key; broadcastable to the columns from `start` on.
        start: the columns before it are seen by every row.
        scratch: memory of the logits' shape, overwritten.
        into: where to write, each (heads, rows).
    """
    m = torch.amax(logits, -1, out=into.maximum).unsqueeze(-1)
    shifted = logits.sub_(m if hidden is None else m.masked_fill(m == -torch.inf, 0))

    # The norm takes two passes, so that nothing cancels however far the mean is from the maximum.
    if hidden is None:
        into.keys.fill_(logits.shape[-1])
        torch.sub(shifted, shifted.mean(-1, keepdim=True), out=scratch)
    else:
        columns = logits.shape[-1] - start
        visible = (~hidden).to(logits.dtype)
        into.keys.copy_(visible.expand(*visible.shape[:-1], columns).sum(-1)).add_(start)
        total = _without_hidden_(shifted[..., start:].clone(), visible).sum(-1).add_(shifted[..., :start].sum(-1))
        torch.sub(shifted, total.div_(into.keys.clamp(min=1)).unsqueeze(-1), out=scratch)
        _without_hidden_(scratch[..., start:], visible)
    torch.linalg.vector_norm(scratch, dim=-1, out=into.norm)

    shifted.clamp_(min=FAR_BELOW)
    weights = torch.softmax(shifted, -1, out=scratch)  # faster than its parts, above all than the exponential
    torch.amax(weights, -1, out=into.top)
    torch.sum(weights.mul_(shifted), -1, out=into.below)


def _without_hidden_(logits: Tensor, visible: Tensor) -> Tensor:
    """0 where `visible` is 0 and not 1: masked_fill takes five times as long, and 0 * -inf would be NaN."""
    return logits.clamp_(min=torch.finfo(logits.dtype).min).mul_(visible)


def stats_of(sums: RowSums) -> AttentionStats:
    """Turn sums into statistics: H = -log(top) - below. Both terms are >= 0, so nothing cancels, however large."""
    log_top = sums.top.log()
    entropy = (0 - (log_top + sums.below)).masked_fill_(sums.maximum == -torch.inf, 0)
    return AttentionStats(entropy, sums.maximum, sums.maximum - log_top, sums.norm)
