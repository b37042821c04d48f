"""nn.Embedding that reads rows off ``gamma / sigma(W) · W``, W being the whole table (num_embeddings, embedding_dim).

A lookup touches a few rows, sigma all of them. With ``s = gamma / sigma``, ``r`` the rows looked up in W, ``g`` the
gradient of the output and ``G`` that of the table in use (g added up row by row), the closed form of
`trimtab.reparam.functional` needs no product of two tables, because ``<G, W> = <g, r>``:

    dL/dW = s (G - (<g, r> / sigma) v u^T)        dL/dgamma = <g, r> / sigma

The gradient of W is dense, as sigma depends on every row. No second table is made in the forward, and none is saved.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.reparam.carried import Carried, is_sharded
from trimtab.reparam.closed_form import (
    call,
    derivatives_go_forward,
    inner_products,
    subtract_sigmas_part_,
    times,
    weight_in_use,
)
from trimtab.reparam.layers import Reparametrized
from trimtab.spectral import (
    Sizes,
    block_sigma,
    per_row,
    replicated,
    right_vector_of_each_row,
    sum_blocks,
    without_autocast,
)


class Embedding(Reparametrized):
    """Mixin for nn.Embedding, except with ``max_norm`` or ``sparse``, which a conversion refuses.

    The row of ``padding_idx`` gets no gradient from here, as in torch: neither where it is looked up nor through
    sigma, which it is part of; and its lookups count in no gradient, gamma's included. (A head tied to the table gives
    it one, as it does without sigma-Reparam.)
    """

    padding_idx: int | None
    scale_grad_by_freq: bool

    def carried(self, weight_name: str = "weight") -> Carried:
        """Return the table with its gamma and vectors."""
        c = super().carried(weight_name)
        if len(c.weight) != len(c.v):  # tables are given more rows in place, for new tokens
            raise RuntimeError(
                f"the embedding has {len(c.weight)} rows, but had {len(c.v)} when it was converted: fold_ the model "
                "first, then resize its embedding, then convert it again"
            )
        return c

    def forward(self, input: Tensor) -> Tensor:
        """Look up indices of any shape (...) in the table in use: (..., embedding_dim), in the dtype of the weight."""
        c = self.carried()
        return scaled_embedding(
            input,
            c.matrix,
            c.gamma,
            c.u,
            c.v,
            c.sizes,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )


def scaled_embedding(
    indices: Tensor,
    weight: Tensor,
    gamma: Tensor,
    u: Tensor,
    v: Tensor,
    sizes: Sizes,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Return the rows of ``gamma / sigma · weight`` at some indices, each row block with its own sigma.

    Args:
        indices: int32 or int64, of any shape (...), also empty.
        weight: shape (num_embeddings, embedding_dim).
        gamma: shape (blocks,).
        u: right singular vectors, shape (blocks, embedding_dim).
        v: left singular vectors, shape (num_embeddings,).
        sizes: rows of each block.
        padding_idx: a row that is a constant and whose lookups give no gradient, if any.
        scale_grad_by_freq: whether the gradient of every lookup is divided by how often its index occurs.

    Returns:
        Shape (..., embedding_dim), in the dtype of the weight; as in torch, autocast does not cast it.
    """
    gamma = replicated(gamma)
    if derivatives_go_forward():
        table = weight_in_use(weight, gamma, u, v, sizes)
        return F.embedding(indices, table, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return call(_ScaledEmbedding, indices, weight, gamma, u.clone(), v.clone(), sizes, padding_idx, scale_grad_by_freq)


class _ScaledEmbedding(torch.autograd.Function):
    """What is saved: the indices, the trained weight itself and small things; sigma is a second output for that."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        indices: Tensor,
        weight: Tensor,
        gamma: Tensor,
        u: Tensor,
        v: Tensor,
        sizes: Sizes,
        padding_idx: int | None,
        by_frequency: bool,
    ) -> tuple[Tensor, Tensor]:
        sigma = block_sigma(weight, u, v, sizes)
        return times(F.embedding(indices, weight), _of_each(indices, gamma / sigma, sizes)), sigma

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.sizes, ctx.padding_idx, ctx.by_frequency = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 8
        with without_autocast(grads[0]):  # also where backward is called under autocast
            return (None, *_ScaledEmbedding.gradients(ctx, grads[0]), *(None,) * 5)  # nor do u and v get one

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return those of weight and gamma, as far as they are needed."""
        indices, weight, gamma, u, v, sigma = ctx.saved_tensors
        sizes: Sizes = ctx.sizes
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((indices == ctx.padding_idx).unsqueeze(-1), 0)
            v = v.clone()
            v[ctx.padding_idx] = 0  # from here on v stands for how sigma follows the weight: not by a constant row
        if ctx.by_frequency:
            grad = grad / _occurrences(indices, weight).unsqueeze(-1)
        if torch.is_grad_enabled():  # a second derivative follows: sigma is then a function of the weight
            following = block_sigma(weight, u, v, sizes)
            sigma = sigma + (following - following.detach())
        scale = gamma / sigma
        d_gamma = _inner_of_lookups(grad, indices, weight, u.dtype, sizes) / sigma
        d_weight = None
        if ctx.needs_input_grad[1]:
            scaled_grad = times(grad, _of_each(indices, scale, sizes))
            in_use = torch.ops.aten.embedding_dense_backward(scaled_grad, indices, len(weight), -1, False)
            d_weight = _subtract_sigmas_part(in_use, scale * d_gamma, u, v, sizes)
        return d_weight, d_gamma.to(gamma.dtype) if ctx.needs_input_grad[2] else None


def _of_each(indices: Tensor, values: Tensor, sizes: Sizes) -> Tensor:
    """Return a value for each index, given one for each block, shape (blocks,): (..., 1), or (1,) for one block."""
    return values if len(sizes) == 1 else per_row(values, sizes)[indices].unsqueeze(-1)


def _occurrences(indices: Tensor, weight: Tensor) -> Tensor:
    """Return how often each index occurs, in the shape of the indices."""
    flat = indices.reshape(-1)
    return flat.new_zeros(len(weight)).index_add(0, flat, torch.ones_like(flat))[indices]


def _inner_of_lookups(grad: Tensor, indices: Tensor, weight: Tensor, dtype: torch.dtype, sizes: Sizes) -> Tensor:
    """Return <g, r> over the lookups in each row block, shape (blocks,), summed in ``dtype``."""
    flat = indices.reshape(-1)
    flat_grad, rows = grad.reshape(-1, grad.shape[-1]), F.embedding(flat, weight)
    if len(sizes) == 1:
        return inner_products(flat_grad, rows, dtype, (len(flat),))
    of_each = (flat_grad * rows).sum(1, dtype=dtype)
    return sum_blocks(of_each.new_zeros(len(weight)).index_add(0, flat, of_each), sizes)


def _subtract_sigmas_part(in_use: Tensor, amounts: Tensor, u: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Subtract ``amount · v u^T`` from each row block, in place where no second derivative is asked for."""
    if not torch.is_grad_enabled() and not is_sharded(in_use):
        return subtract_sigmas_part_(in_use, amounts, u, v, sizes)
    left = (v * per_row(amounts, sizes)).to(in_use.dtype).unsqueeze(1)
    return in_use - left * right_vector_of_each_row(u, sizes).to(in_use.dtype)


# As in `trimtab.reparam.functional`: the signature is written down, not worked out at every call.
vars(_ScaledEmbedding.forward)["__signature__"] = inspect.signature(_ScaledEmbedding.forward)
