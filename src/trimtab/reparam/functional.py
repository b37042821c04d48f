"""Linear maps and convolutions that use ``gamma / sigma(W) · W`` without ever storing that second matrix.

With ``s = gamma / sigma`` and ``G`` the gradient with respect to the weight in use, the gradients are
(Zhai et al., arXiv 2303.06296, with u and v held constant)

    dL/dW = s (G - (<G, W> / sigma) v u^T)        dL/dgamma = <G, W> / sigma

one inner product and one rank-one update beside what a plain layer does. What is saved for backward is the input and
the trained weight itself, as in a plain layer; the scale is computed again. The backward is made of differentiable
operations on what was saved, so second derivatives come out right.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.reparam.carried import is_sharded
from trimtab.spectral import Sizes, block_sigma, full_precision, per_row


def scaled_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, u: Tensor, v: Tensor, sizes: Sizes
) -> Tensor:
    """Return ``input @ (gamma / sigma · weight)^T + bias``, each row block of the weight with its own sigma.

    Args:
        input: shape (..., in).
        weight: shape (out, in).
        bias: shape (out,) or None.
        gamma: shape (blocks,).
        u: right singular vectors, shape (blocks, in).
        v: left singular vectors, shape (out,).
        sizes: rows of each block.

    Returns:
        Shape (..., out), in the input's dtype or in autocast's.
    """
    gamma = _replicated(gamma)
    dtype = _autocast_dtype(input, weight)
    if dtype is None:
        return _apply(_ScaledLinear, input, weight, bias, gamma, u.clone(), v.clone(), sizes)
    with torch.autocast(input.device.type, enabled=False):
        cast_bias = None if bias is None else bias.to(dtype)
        return _apply(_ScaledLinear, input.to(dtype), weight, cast_bias, gamma, u.clone(), v.clone(), sizes)


def scaled_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the convolution of ``input`` with ``gamma / sigma · weight``, plus the bias.

    Sigma is that of the weight flattened to (out, in/groups · kernel). The input has a batch dimension; weight and
    vectors are those of torch's convolution of 1, 2 or 3 spatial dimensions.
    """
    arguments = (tuple(stride), tuple(padding), tuple(dilation), groups)
    dtype = _autocast_dtype(input, weight)
    if dtype is None:
        return _apply(_ScaledConv, input, weight, bias, gamma, u.clone(), v.clone(), arguments)
    with torch.autocast(input.device.type, enabled=False):
        cast_bias = None if bias is None else bias.to(dtype)
        return _apply(_ScaledConv, input.to(dtype), weight, cast_bias, gamma, u.clone(), v.clone(), arguments)


def _apply(function: Any, *arguments: Any) -> Tensor:
    # The vectors come in as clones: their buffers are written in place by data-parallel wrappers, which may happen
    # between this forward and its backward.
    output: Tensor = function.apply(*arguments)
    return output


def _autocast_dtype(input: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the dtype autocast would compute in here, or None where it leaves the input alone."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if input.dtype != weight.dtype:
        raise RuntimeError(
            f"expected an input of the weight's dtype {weight.dtype}, got {input.dtype}: cast it, or use autocast"
        )
    return None


def _replicated(gamma: Tensor) -> Tensor:
    """Tensor parallelism shards every parameter of a layer, gamma too; every rank needs all of it."""
    if not is_sharded(gamma):
        return gamma
    from torch.distributed.tensor import Replicate

    replicated: Tensor = gamma.redistribute(placements=[Replicate()] * gamma.device_mesh.ndim)  # type: ignore[attr-defined]
    return replicated


def _times(tensor: Tensor, scale: Tensor) -> Tensor:
    """Multiply in the precision of the scale, which is at least float32, and return the tensor's own dtype."""
    return (tensor * scale).to(tensor.dtype)


class _Scaled(torch.autograd.Function):
    """What both have in common: input, weight and small things are saved; no second weight."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, gamma, u, v, ctx.options = inputs
        ctx.save_for_backward(input, weight, gamma, u, v)
        ctx.has_bias = bias is not None


def _asked_for(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of input, weight, bias and gamma that are needed; the vectors are constants."""
    wanted = zip(gradients, ctx.needs_input_grad[:4], strict=True)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None, None)


class _ScaledLinear(_Scaled):
    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, u: Tensor, v: Tensor, sizes: Sizes
    ) -> Tensor:
        scale = per_row(gamma / block_sigma(weight, u, v, sizes), sizes)
        rows, columns = weight.shape
        count = input.numel() // columns
        if weight.dtype != input.dtype:  # under autocast the weight is cast anyway: scale it on the way
            return F.linear(input, (weight * scale.unsqueeze(-1)).to(input.dtype), bias)
        smallest = _smallest(rows, columns, count, sizes)
        if smallest == "weight":
            return F.linear(input, _times(weight, scale.unsqueeze(-1)), bias)
        if smallest == "input":
            return F.linear(_times(input, scale), weight, bias)
        output = _times(F.linear(input, weight), scale)
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grads[0]):  # also where backward is called under autocast
            return _ScaledLinear.gradients(ctx, grads[0])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, gamma, u, v = ctx.saved_tensors
        sizes: Sizes = ctx.options
        need_input, need_weight, need_bias, need_gamma = ctx.needs_input_grad[:4]
        sigma = block_sigma(weight, u, v, sizes)
        d_input = d_weight = d_bias = d_gamma = None
        if need_input:
            d_input = _input_gradient(grad, weight, per_row(gamma / sigma, sizes), sizes)
        if need_weight or need_gamma:
            flat_grad = grad.reshape(-1, grad.shape[-1])
            in_use = (flat_grad.t() @ input.reshape(-1, input.shape[-1])).to(weight.dtype)
            d_weight, d_gamma = _weight_gradients(in_use, weight, gamma, sigma, u, v, sizes)
        if need_bias and ctx.has_bias:
            d_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return _asked_for(ctx, d_input, d_weight, d_bias, d_gamma)


def _smallest(rows: int, columns: int, count: int, sizes: Sizes) -> str:
    """Say which of input (or its gradient), weight and output (or its gradient) is the cheapest to scale."""
    costs = {"weight": rows * columns, "output": count * rows}
    if len(sizes) == 1:  # several scales belong to outputs and cannot go onto inputs
        costs["input"] = count * columns
    return min(costs, key=lambda place: costs[place])


def _input_gradient(grad: Tensor, weight: Tensor, scale: Tensor, sizes: Sizes) -> Tensor:
    """Return the gradient with respect to the input, ``grad @ (scale · weight)``."""
    rows, columns = weight.shape
    smallest = _smallest(rows, columns, grad.numel() // rows, sizes)
    if weight.dtype != grad.dtype or smallest == "weight":
        return grad @ (weight * scale.unsqueeze(-1)).to(grad.dtype)
    if smallest == "output":
        return _times(grad, scale) @ weight
    return _times(grad @ weight, scale)


def _weight_gradients(
    in_use: Tensor, matrix: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Turn G, the gradient of the weight in use, into those of the trained matrix and of gamma (the closed form).

    G is overwritten where no second derivative is asked for: a fresh matrix costs several times the arithmetic.
    """
    d_gamma = _inner_products(in_use, matrix, u.dtype, sizes) / sigma
    left, right = (v * per_row(d_gamma, sizes)).to(in_use.dtype), u.to(in_use.dtype)
    scale = per_row(gamma / sigma, sizes).unsqueeze(1)
    parts = [(in_use, left, right[0])]
    if len(sizes) > 1:
        parts = list(zip(in_use.split(sizes), left.split(sizes), right, strict=True))
    if torch.is_grad_enabled() or is_sharded(in_use):
        rest = torch.cat([part - l_part.unsqueeze(1) * r_part for part, l_part, r_part in parts])
        return _times(rest, scale), d_gamma.to(gamma.dtype)
    for part, l_part, r_part in parts:
        part.addr_(l_part, r_part, alpha=-1)
    return in_use.mul_(scale), d_gamma.to(gamma.dtype)


def _inner_products(a: Tensor, b: Tensor, dtype: torch.dtype, sizes: Sizes) -> Tensor:
    """Return <a, b> of each row block, shape (blocks,), summed in ``dtype``."""
    # One dot product reads both once and writes nothing; on GPUs it counts no further than 32 bits.
    if a.dtype == dtype and not is_sharded(a) and a.numel() < 2**31:
        if len(sizes) == 1:
            return torch.dot(a.reshape(-1), b.reshape(-1)).reshape(1)
        parts = zip(a.split(sizes), b.split(sizes), strict=True)
        return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in parts])
    rows = (a * b).sum(1, dtype=dtype)
    return torch.stack([part.sum() for part in rows.split(sizes)])


class _ScaledConv(_Scaled):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        u: Tensor,
        v: Tensor,
        arguments: Any,
    ) -> Tensor:
        scale = gamma / block_sigma(weight.flatten(1), u, v, (weight.shape[0],))
        stride, padding, dilation, groups = arguments
        shape = (1,) * (weight.ndim - 2)
        if weight.dtype == input.dtype and input.numel() < weight.numel():
            input = _times(input, scale)
        else:
            weight = (weight * scale.reshape(1, 1, *shape)).to(input.dtype)
        return torch.convolution(input, weight, bias, stride, padding, dilation, False, [0] * len(shape), groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grads[0]):  # also where backward is called under autocast
            return _ScaledConv.gradients(ctx, grads[0])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, gamma, u, v = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        need_input, need_weight, need_bias, need_gamma = ctx.needs_input_grad[:4]
        sizes = (weight.shape[0],)
        matrix = weight.flatten(1)
        sigma = block_sigma(matrix, u, v, sizes)
        wanted = [need_input, need_weight or need_gamma, False]
        zeros = [0] * (weight.ndim - 2)
        d_input, in_use, _ = torch.ops.aten.convolution_backward(
            grad, input, weight.to(grad.dtype), None, stride, padding, dilation, False, zeros, groups, wanted
        )
        d_weight = d_bias = d_gamma = None
        if need_input:
            d_input = _times(d_input, gamma / sigma)
        if need_weight or need_gamma:
            flat = in_use.to(weight.dtype).flatten(1)
            d_matrix, d_gamma = _weight_gradients(flat, matrix, gamma, sigma, u, v, sizes)
            d_weight = d_matrix.view_as(weight)
        if need_bias and ctx.has_bias:
            d_bias = grad.sum([0, *range(2, grad.ndim)])
        return _asked_for(ctx, d_input, d_weight, d_bias, d_gamma)


# torch works out the signature of such a forward anew at every call, which costs a small layer as much as its
# arithmetic. Where it is written down, it is only read.
for _function in (_ScaledLinear, _ScaledConv):
    vars(_function.forward)["__signature__"] = inspect.signature(_function.forward)
