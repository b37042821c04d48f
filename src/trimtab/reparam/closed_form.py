"""The arithmetic of ``gamma / sigma(W) · W`` and of its gradients, shared by all layers.

With ``s = gamma / sigma`` and ``G`` the gradient with respect to the weight in use, the gradients are
(Zhai et al., arXiv 2303.06296, with u and v held constant)

    dL/dW = s (G - (<G, W> / sigma) v u^T)        dL/dgamma = <G, W> / sigma

one inner product and one rank-one update beside what a plain layer does. A matrix is (rows, columns), rows being
outputs; ``sizes`` are the rows of its blocks, gamma and sigma (blocks,), u (blocks, columns), v (rows,).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trimtab.reparam.carried import is_sharded
from trimtab.spectral import Sizes, block_sigma, is_even, membership, per_row, sum_blocks


def times(tensor: Tensor, scale: Tensor) -> Tensor:
    """Multiply in the precision of the scale, which is at least float32, and return the tensor's own dtype."""
    return (tensor * scale).to(tensor.dtype)


def weight_in_use(weight: Tensor, gamma: Tensor, u: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Return ``gamma / sigma · weight``, in the weight's shape and dtype."""
    matrix = weight.flatten(1)
    return times(matrix, per_row(gamma / block_sigma(matrix, u, v, sizes), sizes).unsqueeze(-1)).view_as(weight)


def cheapest_to_scale(rows: int, columns: int, count: int, sizes: Sizes) -> str:
    """Say which of input (or its gradient), weight and output (or its gradient) is the cheapest to scale."""
    costs = {"weight": rows * columns, "output": count * rows}
    if len(sizes) == 1:  # several scales belong to outputs and cannot go onto inputs
        costs["input"] = count * columns
    cheapest = "weight"  # by hand: torch.compile knows no min with a key over sizes that it leaves open
    for place, cost in costs.items():
        if cost < costs[cheapest]:
            cheapest = place
    return cheapest


def input_is_small(flat_input: Tensor, weight: Tensor, grad: Tensor, sizes: Sizes) -> bool:
    """Say whether the short way through the input's gradient pays, and nothing stands in its way."""
    plain = not torch.is_grad_enabled() and not is_sharded(weight) and not is_sharded(grad)
    one_dtype = grad.dtype == weight.dtype == flat_input.dtype and grad.dtype in (torch.float32, torch.float64)
    return (
        plain and one_dtype and cheapest_to_scale(weight.shape[0], weight.shape[1], len(flat_input), sizes) == "input"
    )


def outer_sum(flat_grad: Tensor, flat_input: Tensor, weight: Tensor) -> Tensor:
    """Return ``grad^T @ input``, shape (out, in), laid out in memory as the weight is."""
    if weight.stride(0) == 1 and weight.stride(1) != 1:
        return (flat_input.t() @ flat_grad).t()
    return flat_grad.t() @ flat_input


def input_gradient(grad: Tensor, weight: Tensor, scale: Tensor, sizes: Sizes) -> Tensor:
    """Return the gradient with respect to the input, ``grad @ (scale · weight)``."""
    rows, columns = weight.shape
    smallest = cheapest_to_scale(rows, columns, grad.numel() // rows, sizes)
    if weight.dtype != grad.dtype or smallest == "weight":
        return grad @ (weight * scale.unsqueeze(-1)).to(grad.dtype)
    if smallest == "output":
        return times(grad, scale) @ weight
    return times(grad @ weight, scale)


def weight_gradients(
    in_use: Tensor, matrix: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Turn G, the gradient of the weight in use, into those of the trained matrix and of gamma (the closed form).

    G is overwritten where no second derivative is asked for: a fresh matrix costs several times the arithmetic.
    """
    d_gamma = inner_products(in_use, matrix, u.dtype, sizes) / sigma
    scale = per_row(gamma / sigma, sizes).unsqueeze(1)
    if torch.is_grad_enabled() or is_sharded(in_use):
        left = (v * per_row(d_gamma, sizes)).unsqueeze(1) * membership(sizes, v)
        rest = in_use - _cut_as(in_use, 0, left.to(in_use.dtype)) @ _cut_as(in_use, 1, u.to(in_use.dtype))
        return times(rest, scale), d_gamma.to(gamma.dtype)
    return subtract_sigmas_part_(in_use, d_gamma, u, v, sizes).mul_(scale), d_gamma.to(gamma.dtype)


def subtract_sigmas_part_(in_use: Tensor, amounts: Tensor, u: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Subtract ``amount · v u^T`` from each row block, in place."""
    left, right = (v * per_row(amounts, sizes)).to(in_use.dtype), u.to(in_use.dtype)
    if len(sizes) == 1:
        return in_use.addr_(left, right[0], alpha=-1)
    if is_even(sizes):
        blocks = in_use.view(len(sizes), sizes[0], in_use.shape[1])
        blocks.baddbmm_(left.view(len(sizes), -1, 1), right.unsqueeze(1), alpha=-1)
        return in_use
    for block, own_left, own_right in zip(in_use.split(sizes), left.split(sizes), right, strict=True):
        block.addr_(own_left, own_right, alpha=-1)
    return in_use


def inner_products(a: Tensor, b: Tensor, dtype: torch.dtype, sizes: Sizes) -> Tensor:
    """Return <a, b> of each row block, shape (blocks,), summed in ``dtype``."""
    # One dot product reads both once and writes nothing; on GPUs it counts no further than 32 bits.
    if len(sizes) == 1 and a.dtype == dtype and not is_sharded(a) and a.numel() < 2**31:
        a, b = (a, b) if a.stride(-1) == 1 else (a.t(), b.t())
        return torch.dot(a.reshape(-1), b.reshape(-1)).reshape(1)
    return sum_blocks((a * b).sum(1, dtype=dtype), sizes)


def _cut_as(matrix: Tensor, dim: int, factor: Tensor) -> Tensor:
    """Cut one factor of a product, whole on every process, as a sharded matrix is cut along its rows or columns.

    Their product then never exists in more than the pieces that each process needs; nothing is sent.
    """
    if not is_sharded(matrix):
        return factor
    from torch.distributed.tensor import Replicate

    placements = [place if place.is_shard(dim) else Replicate() for place in matrix.placements]  # type: ignore[attr-defined]
    return factor.redistribute(placements=placements)  # type: ignore[attr-defined]


def derivatives_go_forward() -> bool:
    """Say whether this runs under torch.func.jvp, jacfwd or hessian, which differentiate plain operations.

    A forward derivative of our autograd functions would be their own to define, and torch.compile takes none that do.
    """
    return forward_ad._current_level >= 0


def call(function: Any, *arguments: Any) -> Tensor:
    """Apply an autograd function whose second output, sigma, is only there to be saved."""
    # The vectors come in as clones: their buffers are written in place by data-parallel wrappers, which may happen
    # between this forward and its backward.
    output: Tensor = function.apply(*arguments)[0]
    return output
