"""Linear maps and convolutions that use ``gamma / sigma(W) · W`` without ever storing that second matrix.

The gradients are the closed form of `trimtab.reparam.closed_form`. What is saved for backward is the input and
the trained weight itself, as in a plain layer; the scale is computed again. The backward is made of differentiable
operations on what was saved, so second derivatives come out right.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.reparam.closed_form import (
    call,
    cheapest_to_scale,
    derivatives_go_forward,
    input_gradient,
    input_is_small,
    outer_sum,
    subtract_sigmas_part_,
    times,
    weight_gradients,
    weight_in_use,
)
from trimtab.spectral import Sizes, block_sigma, per_row, replicated, without_autocast


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
    gamma = replicated(gamma)
    if derivatives_go_forward():
        return F.linear(input, weight_in_use(weight, gamma, u, v, sizes), bias)
    dtype = _autocast_dtype(input, weight)
    if dtype is None:
        return call(_ScaledLinear, input, weight, bias, gamma, u.clone(), v.clone(), sizes)
    with torch.autocast(input.device.type, enabled=False):
        cast_bias = None if bias is None else bias.to(dtype)
        return call(_ScaledLinear, input.to(dtype), weight, cast_bias, gamma, u.clone(), v.clone(), sizes)


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
    if derivatives_go_forward():
        in_use, none = weight_in_use(weight, gamma, u, v, (weight.shape[0],)), [0] * (weight.ndim - 2)
        return torch.convolution(input, in_use, bias, *arguments[:3], False, none, groups)
    dtype = _autocast_dtype(input, weight)
    if dtype is None:
        return call(_ScaledConv, input, weight, bias, gamma, u.clone(), v.clone(), arguments)
    with torch.autocast(input.device.type, enabled=False):
        cast_bias = None if bias is None else bias.to(dtype)
        return call(_ScaledConv, input.to(dtype), weight, cast_bias, gamma, u.clone(), v.clone(), arguments)


def _autocast_dtype(input: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the dtype autocast would compute in here, or None where it leaves the input alone."""
    device = input.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if input.dtype != weight.dtype:
        raise RuntimeError(
            f"expected an input of the weight's dtype {weight.dtype}, got {input.dtype}: cast it, or use autocast"
        )
    return None


class _Scaled(torch.autograd.Function):
    """What both have in common: input, weight and small things are saved; no second weight.

    Sigma is a second output so that it can be saved; it is for no one else.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, bias, gamma, u, v, ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, gamma, u, v, output[1])
        ctx.has_bias = bias is not None


def _asked_for(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of input, weight, bias and gamma that are needed; the vectors are constants."""
    wanted = zip(gradients, ctx.needs_input_grad[:4], strict=True)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None, None)


class _ScaledLinear(_Scaled):
    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, u: Tensor, v: Tensor, sizes: Sizes
    ) -> tuple[Tensor, Tensor]:
        sigma = block_sigma(weight, u, v, sizes)
        scale = per_row(gamma / sigma, sizes)
        rows, columns = weight.shape
        if weight.dtype != input.dtype:  # under autocast the weight is cast anyway: scale it on the way
            return F.linear(input, (weight * scale.unsqueeze(-1)).to(input.dtype), bias), sigma
        smallest = cheapest_to_scale(rows, columns, input.numel() // columns, sizes)
        if smallest == "weight":
            return F.linear(input, times(weight, scale.unsqueeze(-1)), bias), sigma
        if smallest == "input":
            return F.linear(times(input, scale), weight, bias), sigma
        output = F.linear(input, weight)
        if bias is not None and output.dtype == scale.dtype:
            return torch.addcmul(bias, output, scale), sigma
        output = times(output, scale)
        return (output if bias is None else output + bias), sigma

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 7
        with without_autocast(grads[0]):  # also where backward is called under autocast
            return _ScaledLinear.gradients(ctx, grads[0])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, gamma, u, v, sigma = ctx.saved_tensors
        sizes: Sizes = ctx.options
        need_input, need_weight, need_bias, need_gamma = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # a second derivative follows: sigma is then a function of the weight
            sigma = block_sigma(weight, u, v, sizes)
        scale = gamma / sigma
        flat_grad, flat_input = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        d_input = d_weight = d_bias = d_gamma = None
        if need_bias and ctx.has_bias:
            d_bias = flat_grad.sum(0)
        if input_is_small(flat_input, weight, grad, sizes) and need_input and need_weight:
            # <G, W> = <grad W, input>: with few tokens far less to read than G and W themselves
            unscaled = flat_grad @ weight
            inner = torch.dot(unscaled.view(-1), flat_input.reshape(-1)).view(1)
            in_use = outer_sum(flat_grad, times(flat_input, scale), weight)
            d_input = unscaled.mul_(scale).view_as(input)
            d_weight = subtract_sigmas_part_(in_use, scale * inner / sigma, u, v, sizes)
            d_gamma = (inner / sigma).to(gamma.dtype)
            return _asked_for(ctx, d_input, d_weight, d_bias, d_gamma)
        if need_input:
            d_input = input_gradient(grad, weight, per_row(scale, sizes), sizes)
        if need_weight or need_gamma:
            in_use = outer_sum(flat_grad, flat_input, weight).to(weight.dtype)
            d_weight, d_gamma = weight_gradients(in_use, weight, gamma, sigma, u, v, sizes)
        return _asked_for(ctx, d_input, d_weight, d_bias, d_gamma)


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
    ) -> tuple[Tensor, Tensor]:
        sigma = block_sigma(weight.flatten(1), u, v, (weight.shape[0],))
        scale = gamma / sigma
        stride, padding, dilation, groups = arguments
        shape = (1,) * (weight.ndim - 2)
        if weight.dtype == input.dtype and input.numel() < weight.numel():
            input = times(input, scale)
        else:
            weight = (weight * scale.reshape(1, 1, *shape)).to(input.dtype)
        output = torch.convolution(input, weight, bias, stride, padding, dilation, False, [0] * len(shape), groups)
        return output, sigma

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 7
        with without_autocast(grads[0]):  # also where backward is called under autocast
            return _ScaledConv.gradients(ctx, grads[0])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, gamma, u, v, sigma = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        need_input, need_weight, need_bias, need_gamma = ctx.needs_input_grad[:4]
        sizes = (weight.shape[0],)
        matrix = weight.flatten(1)
        if torch.is_grad_enabled():
            sigma = block_sigma(matrix, u, v, sizes)
        wanted = [need_input, need_weight or need_gamma, False]
        zeros = [0] * (weight.ndim - 2)
        d_input, in_use, _ = torch.ops.aten.convolution_backward(
            grad, input, weight.to(grad.dtype), None, stride, padding, dilation, False, zeros, groups, wanted
        )
        d_weight = d_bias = d_gamma = None
        if need_input:
            d_input = times(d_input, gamma / sigma)
        if need_weight or need_gamma:
            flat = in_use.to(weight.dtype).flatten(1)
            d_matrix, d_gamma = weight_gradients(flat, matrix, gamma, sigma, u, v, sizes)
            d_weight = d_matrix.view_as(weight)
        if need_bias and ctx.has_bias:
            d_bias = grad.sum([0, *range(2, grad.ndim)])
        return _asked_for(ctx, d_input, d_weight, d_bias, d_gamma)


# torch works out the signature of such a forward anew at every call, which costs a small layer as much as its
# arithmetic. Where it is written down, it is only read.
for _function in (_ScaledLinear, _ScaledConv):
    vars(_function.forward)["__signature__"] = inspect.signature(_function.forward)
