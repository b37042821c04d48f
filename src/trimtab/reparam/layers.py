"""The converted layers: each plain class gets a subclass whose forward applies gamma / sigma to the trained weight.

Converting swaps the class of the very same module object, so references, hooks, sharing and the Parameter itself stay
what they were. A converted module keeps its ``weight`` and carries, beside it, the parameter ``gamma`` and the buffers
``sigma_u`` and ``sigma_v`` (for nn.MultiheadAttention: ``in_proj_weight``, ``in_proj_gamma``, ``in_proj_sigma_u`` ...).
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.reparam import registry
from trimtab.reparam.functional import scaled_conv, scaled_linear
from trimtab.spectral import Sizes, block_sigma, per_row, spectral_norm


class Carried(NamedTuple):
    """One converted weight with what it carries; all tensors are the live ones.

    Attributes:
        weight: the trained Parameter.
        matrix: a view of the weight of shape (rows, columns).
        gamma: shape (blocks,).
        u: right singular vectors, shape (blocks, columns).
        v: left singular vectors, shape (rows,).
        sizes: rows of each block.
    """

    weight: Tensor
    matrix: Tensor
    gamma: Tensor
    u: Tensor
    v: Tensor
    sizes: Sizes

    def sigma(self) -> Tensor:
        """Return v^T W u of each block, shape (blocks,)."""
        return block_sigma(self.matrix, self.u, self.v, self.sizes)


def carried_names(weight_name: str) -> tuple[str, str, str]:
    """Return the names under which a module carries gamma, u and v of one of its weights."""
    gamma, u, v = (weight_name.replace("weight", part) for part in ("gamma", "sigma_u", "sigma_v"))
    return gamma, u, v


def as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """View a weight as (rows, columns), rows being outputs; ``transposed`` weights are stored (in, out)."""
    return weight.t() if transposed else weight.flatten(1)


class Start(NamedTuple):
    """What a weight is converted with: gamma (blocks,), u (blocks, columns), v (rows,), rows of each block."""

    gamma: Tensor
    u: Tensor
    v: Tensor
    sizes: Sizes


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
        c = self.carried(weight_name)
        scale = per_row(c.gamma / c.sigma(), c.sizes)
        shape = (1, -1) if self.transposed else (-1,) + (1,) * (c.weight.ndim - 1)
        return (c.weight * scale.reshape(shape)).to(c.weight.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names the plain class; deepcopy goes the same way.
        return _rebuild, (self.plain_class,), self.__dict__

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
        missing_keys.extend(absent)

    def _start_as_plain(self, weight_name: str) -> None:
        """Give a freshly loaded plain weight the gamma and vectors with which it computes what it did."""
        c = self.carried(weight_name)
        start = exact_start(c.matrix.detach(), c.sizes)
        with torch.no_grad():
            for live, value in ((c.u, start.u), (c.v, start.v), (c.gamma, start.gamma)):
                live.copy_(value)


def exact_start(matrix: Tensor, sizes: Sizes) -> Start:
    """Return the exact singular vectors of each row block, and the gamma that leaves the function unchanged.

    Raises:
        ValueError: if the matrix is sharded or on the meta device, not floating, empty, zero or not finite; the
            message says which and what to do.
    """
    if hasattr(matrix, "device_mesh"):
        raise ValueError("it is sharded already: convert (or load) first, then shard")
    if matrix.is_meta:
        raise ValueError("it is on the meta device: give it values first, then convert")
    if not matrix.is_floating_point() or matrix.numel() == 0:
        raise ValueError(f"expected floating values, got {matrix.dtype} of shape {tuple(matrix.shape)}")
    triplets = [spectral_norm(block) for block in matrix.split(sizes)]
    if any(not bool(sigma > 0) for sigma, _, _ in triplets):
        raise ValueError(
            "it is zero, so it has no direction to normalise: initialise it, or leave it out with filter_fn"
        )
    u = torch.stack([u for _, u, _ in triplets])
    v = torch.cat([v for _, _, v in triplets])
    # Not the sigma of the decomposition but v^T W u as the forward computes it: their ratio is then exactly 1.
    return Start(block_sigma(matrix, u, v, sizes), u, v, sizes)


def carry_(module: nn.Module, starts: dict[str, tuple[nn.Parameter, Tensor, Tensor, Sizes]]) -> None:
    """Turn a plain module into its converted class, carrying (gamma, u, v, sizes) for each weight named."""
    for weight_name, (gamma, u, v, _) in starts.items():
        gamma_name, u_name, v_name = carried_names(weight_name)
        module.register_parameter(gamma_name, gamma)
        module.register_buffer(u_name, u)
        module.register_buffer(v_name, v)
    module.__dict__["_carried_sizes"] = {name: sizes for name, (_, _, _, sizes) in starts.items()}
    module.__class__ = converted_class(type(module))
    registry.add(module)


def drop_(module: Reparametrized) -> None:
    """Turn a converted module back into its plain class, dropping gamma and vectors; the weight stays as it is."""
    registry.discard(module)
    for weight_name in module._carried_sizes:
        for name in carried_names(weight_name):
            delattr(module, name)
    del module._carried_sizes
    module.__class__ = module.plain_class  # type: ignore[assignment]


def _rebuild(plain_class: type[nn.Module]) -> nn.Module:
    cls = converted_class(plain_class)
    module = cls.__new__(cls)
    registry.add(module)
    return module


class _Linear(Reparametrized):
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        c = self.carried()
        return scaled_linear(input, c.matrix, self.bias, c.gamma, c.u, c.v, c.sizes)


class _TransposedLinear(_Linear):
    """Hugging Face's Conv1D, whose weight is (in, out)."""

    transposed = True


class _Conv(Reparametrized):
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:
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


_converted_classes: dict[type[nn.Module], type[nn.Module]] = {}


def converted_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the converted subclass of a plain layer class (made once for each).

    Raises:
        TypeError: if the class is none that `mixin_of` knows.
    """
    if plain not in _converted_classes:
        mixin = mixin_of(plain)
        if mixin is None:
            raise TypeError(f"{plain.__name__} is no layer sigma-Reparam knows")
        name, contents = f"SigmaReparam{plain.__name__}", {"plain_class": plain, "__module__": __name__}
        _converted_classes[plain] = type(name, (mixin, plain), contents)
    return _converted_classes[plain]


def mixin_of(plain: type[nn.Module]) -> type[Reparametrized] | None:
    """Return the mixin that converts a class, or None for a class whose forward is not one we know.

    A subclass counts as its base only while it keeps the base's forward: a forward of its own may do anything with
    the weight.
    """
    from trimtab.reparam.multihead import MultiheadAttention

    known: list[tuple[type[nn.Module], type[Reparametrized]]] = [
        (nn.Linear, _Linear),
        (nn.Conv1d, _Conv),
        (nn.Conv2d, _Conv),
        (nn.Conv3d, _Conv),
        (nn.MultiheadAttention, MultiheadAttention),
    ]
    for base, mixin in known:
        if issubclass(plain, base) and plain.forward is base.forward:
            return mixin
    if plain.__name__ == "Conv1D" and plain.__module__ == "transformers.pytorch_utils":
        return _TransposedLinear
    return None
