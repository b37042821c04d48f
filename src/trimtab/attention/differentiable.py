"""The gradient of attention entropy, computed chunk by chunk: nothing of size L x S is kept for the backward."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.attention.chunks import Chunk, chunks, memory_for
from trimtab.attention.logits import Logits
from trimtab.attention.measure import measured
from trimtab.attention.stats import FAR_BELOW
from trimtab.spectral import exact_products


def differentiable_entropy(of: Logits) -> Tensor:
    """Entropy in nats, of the shape of `of`, with a gradient for query, key and a floating-point mask.

    Raises:
        ValueError: there is a `score_mod`.
    """
    if of.score_mod is not None:
        raise ValueError(
            "score_mod is not differentiated: pass softcap or a floating-point attn_mask instead, "
            "or detach query and key (or call under torch.no_grad()) to measure only"
        )
    entropy: Tensor = _Entropy.apply(of.query, of.key, of.mask, of)
    return entropy


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, of: Logits) -> Tensor:
        ctx.save_for_backward(query, key, mask)
        ctx.of = replace(of, query=query.new_empty(0), key=key.new_empty(0), mask=None)  # tensors are saved above
        return measured(of)[0].entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():  # so it is under create_graph=True alone; the result would pass for a constant
            raise RuntimeError(
                "attention_entropy can be differentiated once, not twice: leave it out of the loss whose gradient "
                "is differentiated (create_graph=True), or compute it by softmax for that"
            )
        query, key, mask = ctx.saved_tensors
        of = replace(ctx.of, query=query, key=key, mask=mask)
        wanted_query, wanted_key, wanted_mask, _ = ctx.needs_input_grad
        lead, group, (L, D), S = of.lead, of.group, query.shape[-2:], key.shape[-2]
        key_lead = (*lead[:-1], lead[-1] // group)
        options = {"dtype": of.dtype, "device": query.device}
        # Of the shape that query and key are broadcast to; summed at the end where they were.
        grad_query = torch.zeros(math.prod(lead), L, D, **options) if wanted_query else None
        grad_key = torch.zeros(math.prod(key_lead), S, D, **options) if wanted_key else None
        grad_mask = _MaskGradient(mask, of) if wanted_mask else None
        grad = grad.reshape(math.prod(lead), L)
        with exact_products(query.device.type):
            for chunk in chunks(of, memory_for(of), slope=True):
                d_logits = _logit_gradient(chunk.logits, grad[chunk.heads, chunk.rows])
                if grad_mask is not None:
                    grad_mask.add(chunk, d_logits)
                if chunk.slope is not None:
                    d_logits = d_logits * chunk.slope
                d_product = (d_logits * of.scale).view(len(chunk.key), -1, d_logits.shape[-1])
                if grad_query is not None:
                    rows = (d_product @ chunk.key).view(len(d_logits), -1, D)
                    grad_query[chunk.heads, chunk.rows] = rows
                if grad_key is not None:
                    grad_key[chunk.key_heads, chunk.columns] += d_product.mT @ chunk.query
        return (
            None if grad_query is None else grad_query.view(*lead, L, D).sum_to_size(query.shape).to(query.dtype),
            None if grad_key is None else grad_key.view(*key_lead, S, D).sum_to_size(key.shape).to(key.dtype),
            None if grad_mask is None else grad_mask.total.view(mask.shape).to(mask.dtype),
            None,
        )


def _logit_gradient(logits: Tensor, grad: Tensor) -> Tensor:
    """Gradient dH / ds_j = -p_j (log p_j + H), times the incoming gradient of H: of the logits' shape."""
    nothing_seen = logits.amax(-1, keepdim=True) == -torch.inf
    log_p = logits.masked_fill(nothing_seen, 0).log_softmax(-1)
    p = log_p.exp()  # exactly 0 where the key is hidden
    log_p.clamp_(min=FAR_BELOW)  # no 0 * -inf
    entropy = -(p * log_p).sum(-1, keepdim=True)
    return log_p.add_(entropy).mul_(p).mul_(-grad.unsqueeze(-1)).masked_fill_(nothing_seen, 0)


class _MaskGradient:
    """Adds up the gradient of a mask that may be broadcast over heads, queries or keys."""

    def __init__(self, mask: Tensor, of: Logits) -> None:
        self.total = torch.zeros(mask.shape, dtype=of.dtype, device=mask.device).view(-1, *mask.shape[-2:])
        matrices = torch.arange(len(self.total), device=mask.device).view(mask.shape[:-2])
        self._matrix_of_head = matrices.expand(of.lead).reshape(-1)

    def add(self, chunk: Chunk, d_logits: Tensor) -> None:
        _, rows, columns = self.total.shape
        d_logits = d_logits.sum(1, keepdim=True) if rows == 1 else d_logits
        d_logits = d_logits.sum(2, keepdim=True) if columns == 1 else d_logits
        part = self.total[:, chunk.rows if rows > 1 else slice(None), chunk.columns if columns > 1 else slice(None)]
        part.index_add_(0, self._matrix_of_head[chunk.heads], d_logits)
