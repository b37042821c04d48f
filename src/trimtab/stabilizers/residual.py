"""Residual branches: the layers whose output is added to the residual stream, and a scale on that output.

The scale is a parameter or buffer ``residual_scale`` of the layer itself, applied by a forward hook.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.errors import ConversionError
from trimtab.reparam import fastpath
from trimtab.reparam.blocks import is_linear
from trimtab.reparam.carried import is_sharded, memory_of
from trimtab.reparam.layers import Reparametrized
from trimtab.reparam.plan import shared_with
from trimtab.stabilizers.parts import (
    ATTENTION_ENDS,
    MLP_ENDS,
    attention_of,
    attentions,
    blocks,
    is_transposed,
    is_within,
)

_SCALE = "residual_scale"
_DENSE_IN = "output.dense"  # the end of an MLP in BERT's family


class Branch(NamedTuple):
    """One residual branch.

    Attributes:
        name: dotted name of `layer`.
        layer: the module whose output is added to the residual stream: a linear layer, or nn.MultiheadAttention.
        kind: what the branch is.
        block: dotted name of the Transformer block it is in.
    """

    name: str
    layer: nn.Module
    kind: Literal["attention", "mlp"]
    block: str


def residual_branches(model: nn.Module) -> list[Branch]:
    """Return the residual branches of a Transformer, in the order of its modules.

    Raises:
        ConversionError: no Transformer block is found, or not all branches of one.
    """
    around, inside = blocks(model), attentions(model)
    if not around:
        raise ConversionError(
            "found no residual branches: no list of this model holds modules with attention (a layer called query, "
            "q_proj, qkv, c_attn ... or nn.MultiheadAttention) and linear layers beside it"
        )
    of_attention = attention_of(model)
    found = [branch for block in around for branch in _ends(model, block, of_attention)]
    for block in around:
        missing = [
            name
            for name in inside
            if is_within(name, (block,))
            and sum(is_within(each.name, (name,)) for each in found if each.kind == "attention") != 1
        ]
        if missing:
            raise ConversionError(
                f"{missing[0]} ends in no single layer that could be told: looked for nn.MultiheadAttention or a "
                f"linear layer called {', '.join(sorted(ATTENTION_ENDS))}"
            )
        if not any(each.block == block and each.kind == "mlp" for each in found):
            raise ConversionError(
                f"{block or 'the model'} has no MLP whose last layer could be told: looked for a linear layer called "
                f"{', '.join(sorted(MLP_ENDS))} or {_DENSE_IN}"
            )
    return found


def _ends(model: nn.Module, block: str, of_attention: Callable[[str], bool]) -> list[Branch]:
    found = []
    for own, module in model.get_submodule(block).named_modules():
        name = ".".join(part for part in (block, own) if part)
        if isinstance(module, nn.MultiheadAttention):
            found.append(Branch(name, module, "attention", block))
        elif is_linear(module) and not _is_torchs(model, name):
            sequence = _sequence_it_ends(model, name, module)
            short = (name if sequence is None else name.rpartition(".")[0]).rpartition(".")[2].lower()
            is_dense = f".{name}".endswith(f".{_DENSE_IN}")
            if of_attention(name):
                if short in ATTENTION_ENDS:
                    found.append(Branch(name, module, "attention", block))
            elif short in MLP_ENDS or is_dense or (sequence is not None and len(sequence) > 1):
                found.append(Branch(name, module, "mlp", block))
    return found


def _sequence_it_ends(model: nn.Module, name: str, module: nn.Module) -> list[nn.Module] | None:
    """Return the linear layers of the nn.Sequential that a layer is the last of, dropout aside; None if of none."""
    holder = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(holder, nn.Sequential):
        return None
    after = [child for child in holder if not isinstance(child, nn.Dropout | nn.Identity)]
    return [child for child in after if is_linear(child)] if after[-1] is module else None


def _is_torchs(model: nn.Module, name: str) -> bool:
    """Say whether a layer is the output projection of nn.MultiheadAttention, which reads past it."""
    return bool(name) and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def last_linear(layer: nn.Module) -> nn.Module:
    """Return the linear layer whose weight makes the output of a branch."""
    return layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer


def width_of(branch: Branch) -> int:
    """Return how many features a branch puts out."""
    linear = last_linear(branch.layer)
    weight: Tensor = linear.weight  # type: ignore[assignment]  # also a parametrized one
    return weight.shape[1 if is_transposed(linear) else 0]


def expect_unscaled(branches: list[Branch]) -> None:
    """Raise a ConversionError if a branch has a scale already, or cannot be given one."""
    for branch in branches:
        weight: Tensor = last_linear(branch.layer).weight  # type: ignore[assignment]
        if hasattr(branch.layer, _SCALE):
            raise ConversionError(
                f"{branch.name} already scales its residual branch: use one of layer-scale, rezero and deepnorm, or "
                "fold_ first"
            )
        if is_sharded(weight):
            raise ConversionError(f"{branch.name} is sharded already: stabilize the model first, then shard it")
        if weight.is_meta:
            raise ConversionError(f"{branch.name} is on the meta device: give it values first")


def scale_branches_(model: nn.Module, scales: list[tuple[Branch, list[float]]], trained: bool) -> None:
    """Multiply what branches add by scales.

    Args:
        model: the model that they are in.
        scales: branches without a scale, each with one value, or one for each feature.
        trained: whether the scales are parameters; buffers otherwise.
    """
    for branch, scale in scales:
        weight: Tensor = last_linear(branch.layer).weight  # type: ignore[assignment]
        values = torch.tensor(scale, dtype=torch.float64).to(weight.device, weight.dtype)
        if trained:
            branch.layer.register_parameter(_SCALE, nn.Parameter(values))
        else:
            branch.layer.register_buffer(_SCALE, values)
        branch.layer.register_forward_hook(scale_output)
    fastpath.switch_off_(model)


def scale_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Multiply the output of a layer, or the first of its outputs, by its scale: a forward hook."""
    if isinstance(output, tuple):  # nn.MultiheadAttention also returns its weights
        return (scale_output(module, args, output[0]), *output[1:])
    scale: Tensor = module.residual_scale  # type: ignore[assignment]
    return output * scale.to(output.dtype)


def fold_branches_(model: nn.Module) -> None:
    """Write the scales of residual branches into the weights and biases of their last layers.

    Raises:
        ConversionError: a weight is sharded, shared, not finite once scaled, or no parameter of its own.
    """
    scaled = [(name, m) for name, m in model.named_modules() if scale_output in m._forward_hooks.values()]
    for name, module in scaled:
        _expect_foldable(model, name, last_linear(module), module)
    for _, module in scaled:
        linear = last_linear(module)
        scale: Tensor = module.residual_scale.detach()
        with torch.no_grad():
            for parameter in linear._parameters.values():
                if parameter is not None and parameter is not module._parameters.get(_SCALE):
                    rows = scale if parameter.ndim == 1 or is_transposed(linear) else scale.unsqueeze(-1)
                    parameter.mul_(rows)
        delattr(module, _SCALE)
        for key, hook in list(module._forward_hooks.items()):
            if hook is scale_output:
                del module._forward_hooks[key]
    fastpath.restore_(model)


def _expect_foldable(model: nn.Module, name: str, linear: nn.Module, module: nn.Module) -> None:
    weight = linear._parameters.get("weight")
    if weight is None or isinstance(linear, Reparametrized):
        raise ConversionError(f"{name}: its weight is no plain parameter, so no scale can be folded into it")
    if is_sharded(weight):
        raise ConversionError(
            f"{name} is sharded: load the full state dict into a stabilized model of one process and fold that"
        )
    if memory_of(weight) in shared_with(model, {(id(linear), "weight")}):
        raise ConversionError(
            f"{name} shares its weight with another layer, which has not its scale: it cannot be folded"
        )
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(module.residual_scale).all()):  # type: ignore[arg-type]
        raise ConversionError(f"{name} is not finite: fold a checkpoint from before the run diverged")
