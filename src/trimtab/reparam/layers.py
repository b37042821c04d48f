"""The converted layers: their forward applies gamma / sigma to the trained weight.

A converted module keeps its ``weight`` and carries, beside it, the parameter ``gamma`` and the buffers ``sigma_u`` and
``sigma_v`` (nn.MultiheadAttention: ``in_proj_weight``, ``in_proj_gamma``, ``in_proj_sigma_u`` ...).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.reparam.carried import Carried, as_matrix, carried_names, exact_start
from trimtab.reparam.functional import scaled_conv, scaled_linear
from trimtab.spectral import Sizes, per_row


class Reparametrized(nn.Module):
    """Mixin of all converted layers: carries the vectors, keeps them in float32, loads plain checkpoints."""

    plain_class: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False
    _carried_sizes: dict[str, Sizes]

    def carried(self, weight_name: str = "weight") -> Carried:
        """Return one converted weight with its gamma and vectors."""
        weight: Tensor = getattr(self, weight_name)
        gamma, u, v = (getattr(self, name) for name in carried_names(weight_name))
        return Carried(weight, as_matrix(weight, self.transposed), gamma, u, v, self._carried_sizes[weight_name])

    def scaled(self, weight_name: str) -> Tensor:
        """Return gamma / sigma · W in the shape and dtype of the weight; differentiable in both."""
        c = self.carried(weight_name).replicated()
        scale = per_row(c.gamma / c.sigma(), c.sizes)
        shape = (1, -1) if self.transposed else (-1,) + (1,) * (c.weight.ndim - 1)
        return (c.weight * scale.reshape(shape)).to(c.weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept: dict[int, torch.dtype] = {}
        for weight_name in self._carried_sizes:
            for name in carried_names(weight_name):
                tensor = getattr(self, name)
                for each in (tensor, tensor.grad):
                    if each is not None:
                        kept[id(each)] = each.dtype

        def keep_precision(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if id(tensor) in kept and torch.promote_types(changed.dtype, torch.float32) != changed.dtype:
                return tensor.to(changed.device)  # moved, but not cast below float32
            return changed

        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as usual; a plain checkpoint (a weight without gamma and vectors) has them computed for it."""
        absent: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs)
        for weight_name in self._carried_sizes:
            keys = [prefix + name for name in carried_names(weight_name)]
            if prefix + weight_name in state_dict and all(key in absent for key in keys):
                absent = [key for key in absent if key not in keys]
                try:
                    self._start_as_plain(weight_name)
                except ValueError as error:
                    error_msgs.append(f"{prefix}{weight_name} comes from a plain checkpoint: {error}")
            for name in carried_names(weight_name):
                tensor = getattr(self, name)
                if torch.promote_types(tensor.dtype, torch.float32) != tensor.dtype:  # a half-precision file, assigned
                    self._put(name, tensor.detach().float(), tensor.requires_grad)
        missing_keys.extend(absent)

    def _start_as_plain(self, weight_name: str) -> None:
        """Give a freshly loaded plain weight the gamma and vectors with which it computes what it did."""
        c = self.carried(weight_name)
        start = exact_start(c.matrix.detach(), c.sizes)
        for name, value in zip(carried_names(weight_name), (start.gamma, start.u, start.v), strict=True):
            live: Tensor = getattr(self, name)
            if live.is_meta:
                self._put(name, value, live.requires_grad)
            else:
                live.data.copy_(value)

    def _put(self, name: str, value: Tensor, requires_grad: bool) -> None:
        is_parameter = name in self._parameters
        setattr(self, name, nn.Parameter(value, requires_grad) if is_parameter else value)


class Linear(Reparametrized):
    """Mixin for nn.Linear."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out) with the weight in use."""
        c = self.carried()
        return scaled_linear(input, c.matrix, self.bias, c.gamma, c.u, c.v, c.sizes)


class TransposedLinear(Linear):
    """Hugging Face's Conv1D, whose weight is (in, out)."""

    transposed = True


class Conv(Reparametrized):
    """Mixin for nn.Conv1d, nn.Conv2d and nn.Conv3d, grouped or not, with any padding."""

    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, spatial...), or (C, spatial...), with the weight in use."""
        c = self.carried()
        spatial = len(self.kernel_size)
        if input.ndim not in (spatial + 1, spatial + 2):
            raise ValueError(
                f"expected input of shape (B, C, {spatial} spatial sizes) or without B, got {tuple(input.shape)}"
            )
        batched = input if input.ndim == spatial + 2 else input.unsqueeze(0)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            batched = F.pad(batched, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * spatial
        output = scaled_conv(
            batched,
            c.weight,
            self.bias,
            c.gamma,
            c.u,
            c.v,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return output if input.ndim == spatial + 2 else output.squeeze(0)
