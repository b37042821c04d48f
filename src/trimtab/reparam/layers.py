"""The converted layers: their forward applies gamma / sigma to the trained weight.

A converted module keeps its ``weight`` and carries, beside it, the parameter ``gamma`` and the buffers ``sigma_u`` and
``sigma_v`` (nn.MultiheadAttention: ``in_proj_weight``, ``in_proj_gamma``, ``in_proj_sigma_u`` ...).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.reparam.carried import Carried, Start, as_matrix, carried_names, cut_like, exact_start, is_sharded, write_
from trimtab.reparam.config import SigmaReparam
from trimtab.reparam.functional import scaled_conv, scaled_linear
from trimtab.spectral import Sizes, per_row, replicated
from trimtab.spectral.exact import orthonormal_rows


class Reparametrized(nn.Module):
    """Mixin of all converted layers: carries the vectors, keeps them in float32, loads plain checkpoints."""

    plain_class: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False
    _carried_sizes: dict[str, Sizes]
    _sigma_config: SigmaReparam

    def carried(self, weight_name: str = "weight") -> Carried:
        """Return one converted weight with its gamma and vectors."""
        weight: Tensor = getattr(self, weight_name)
        gamma, basis, v = (getattr(self, name) for name in carried_names(weight_name))
        return Carried(weight, as_matrix(weight, self.transposed), gamma, basis, v, self._carried_sizes[weight_name])

    def scaled(self, weight_name: str) -> Tensor:
        """Return gamma / sigma · W in the shape and dtype of the weight; differentiable in both."""
        c = self.carried(weight_name).replicated()
        scale = per_row(c.gamma / c.sigma(), c.sizes)
        shape = (1, -1) if self.transposed else (-1,) + (1,) * (c.weight.ndim - 1)
        return (c.weight * scale.reshape(shape)).to(c.weight.dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as usual, but keep gamma whole where tensor parallelism cuts every parameter of a layer alike.

        A few numbers, which every process needs, are not worth cutting; and an empty piece of a gamma could not be
        sharded once more by fully_shard, which replaces parameters without asking here.
        """
        before = self._parameters.get(name)
        its_gamma = any(name == carried_names(weight_name)[0] for weight_name in self._carried_sizes)
        if its_gamma and before is not None and param is not None and is_sharded(param) and not is_sharded(before):
            param = nn.Parameter(replicated(param.detach()), param.requires_grad)
        super().register_parameter(name, param)

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
            if id(tensor) in kept and not changed.is_meta:
                # What is not known stays so, also where a tied layer, or `to_empty`, comes this way twice:
                # `refresh_(exact=True)`, or loading, fills it in.
                if tensor.is_meta:
                    changed.fill_(math.nan)
                else:
                    changed.masked_fill_(tensor.isnan().to(changed.device), math.nan)
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
        """Load as usual; what a checkpoint lacks beside a weight, gamma and vectors or these alone, is computed."""
        for weight_name in self._carried_sizes:
            self._fit_basis(state_dict, prefix + carried_names(weight_name)[1], self.carried(weight_name).basis)
            self._drop_own(state_dict, prefix, weight_name)
        absent: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs)
        for weight_name in self._carried_sizes:
            keys = [prefix + name for name in carried_names(weight_name)]
            lacking = [key for key in keys if key in absent]
            if prefix + weight_name in state_dict and lacking:
                if lacking in (keys, keys[1:]):  # a plain checkpoint, or one of parameters alone
                    absent = [key for key in absent if key not in keys]
                try:
                    start = self.exact_start(weight_name)
                    self.start_(weight_name, start, "spectral" if keys[0] in lacking else "keep")
                except ValueError as error:
                    source = "a plain checkpoint" if keys[0] in lacking else "a checkpoint without singular vectors"
                    error_msgs.append(f"{prefix}{weight_name} comes from {source}: {error}")
            for name in carried_names(weight_name):
                tensor = getattr(self, name)
                if torch.promote_types(tensor.dtype, torch.float32) != tensor.dtype:  # a half-precision file, assigned
                    self._put(name, tensor.detach().float(), tensor.requires_grad)
        missing_keys.extend(absent)

    @staticmethod
    def _fit_basis(state_dict: dict[str, Any], key: str, live: Tensor) -> None:
        """Let a checkpoint made with another number of vectors load: its first ones count, new ones are drawn."""
        saved = state_dict.get(key)
        if not isinstance(saved, Tensor) or saved.ndim != 3 or saved.shape == live.shape or is_sharded(saved):
            return
        if (len(saved), saved.shape[2]) == (len(live), live.shape[2]):
            count = live.shape[1]  # what lives there is no help: in a model fresh from the meta device it is NaN
            kept = saved[:, :count].to(live.dtype)
            more = torch.stack([orthonormal_rows(own, count)[len(own) :] for own in kept])
            state_dict[key] = torch.cat([kept, more], dim=1)

    def _drop_own(self, state_dict: dict[str, Any], prefix: str, weight_name: str) -> None:
        """Drop gamma and vectors that are this module's own, beside a weight that is not: no checkpoint held them.

        torch.distributed's ``set_model_state_dict`` fills what a full state dict lacks with the tensors of the model.
        """
        names = carried_names(weight_name)
        own = [state_dict.get(prefix + name) is getattr(self, name) for name in (*names, weight_name)]
        if own == [True, True, True, False] and prefix + weight_name in state_dict:
            for name in names:
                del state_dict[prefix + name]

    def exact_start(self, weight_name: str) -> Start:
        """Return the exact vectors of one weight, and sigma as its gamma; errors as `carried.exact_start`."""
        c = self.carried(weight_name)
        if c.weight.is_meta:
            raise ValueError("it is on the meta device: give it values first")
        return exact_start(c.matrix.detach(), c.sizes, self._sigma_config.vectors)

    def start_(self, weight_name: str, start: Start, gamma: Literal["keep", "spectral", "config"]) -> None:
        """Write the vectors of one weight; gamma stays, becomes sigma, or what the configuration says."""
        first_gamma = self._sigma_config.first_gamma(start.gamma) if gamma == "config" else start.gamma
        values = dict(zip(carried_names(weight_name), (first_gamma, start.basis, start.v), strict=True))
        if gamma == "keep":
            del values[carried_names(weight_name)[0]]
        for name, value in values.items():
            live: Tensor = getattr(self, name)
            if live.is_meta or torch.promote_types(live.dtype, value.dtype) != live.dtype:
                self._put(name, cut_like(live, value), live.requires_grad)
            else:
                write_(live, value)

    def _put(self, name: str, value: Tensor, requires_grad: bool) -> None:
        is_parameter = name in self._parameters
        setattr(self, name, nn.Parameter(value, requires_grad) if is_parameter else value)

    def reset_parameters(self) -> None:
        """Draw the weights anew, as the plain layer does, and start gamma and the vectors from them."""
        names = ("reset_parameters", "_reset_parameters")  # the second is nn.MultiheadAttention's
        draw = next((getattr(self.plain_class, name) for name in names if hasattr(self.plain_class, name)), None)
        if draw is None:
            raise AttributeError(
                f"{self.plain_class.__name__} has no reset_parameters: draw its weight by your own rule, then call "
                "trimtab.refresh_(model, exact=True)"
            )
        draw(self)
        for weight_name in self._carried_sizes:
            if not self.carried(weight_name).weight.is_meta:
                self.start_(weight_name, self.exact_start(weight_name), "config")


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
