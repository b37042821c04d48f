"""Low-rank layers made whole again."""

import torch
from torch import Tensor, nn

from trimtab.attention.low_rank import LowRankFused, LowRankLinear
from trimtab.errors import ConversionError
from trimtab.reparam import FilterFn
from trimtab.reparam.carried import is_sharded, memory_of
from trimtab.reparam.convert import expect_module
from trimtab.stabilizers.low_rank_layers import PLAIN, replace_
from trimtab.stabilizers.parts import is_transposed


def merge_low_rank_(model: nn.Module, filter_fn: FilterFn | None = None) -> nn.Module:
    """Multiply the factors of low-rank layers back into one layer each, in place: the model computes what it did.

    Layers that `low_rank_` replaced come back as they were; one that was built of low rank becomes an nn.Linear. Norms
    of queries and keys (`qk-norm`) move to the layer that comes back.

    Args:
        model: any module.
        filter_fn: called with (low-rank layer, dotted name); only those for which it returns True are merged.

    Returns:
        The model.

    Raises:
        ConversionError: there is no such layer, or a factor is no plain layer (fold what is on it first), has hooks,
            is sharded, on the meta device or not finite. The model is then as it was.
        TypeError: the model is not a module.
    """
    expect_module(model)
    found = [pair for pair in low_rank_layers(model).items() if filter_fn is None or filter_fn(pair[1], pair[0])]
    if not found:
        raise ConversionError("nothing to merge: no layer of this model is of low rank")
    for name, layer in found:
        for part_name, part in _parts(layer).items():
            _expect_mergeable(f"{name}.{part_name}".strip("."), part, fused=isinstance(layer, LowRankFused))
    products: dict[tuple[int, int], nn.Parameter] = {}  # factors that are shared make one weight
    merged: dict[int, nn.Module] = {}
    with torch.inference_mode(False):
        for _, layer in found:
            first = next(iter(_parts(layer).values()))
            key = (memory_of(first.up.weight), memory_of(first.down.weight))
            plain = _plain_layer(layer)
            if key not in products:
                product = _product(layer)
                products[key] = nn.Parameter(
                    product.t().contiguous() if is_transposed(plain) else product, first.up.weight.requires_grad
                )
            merged[id(layer)] = _merged(layer, plain, products[key])
    replace_(model, merged)
    return model


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear | LowRankFused]:
    """Return the low-rank layers of a model by dotted name; the parts of a fused one are not named beside it."""
    within = {id(part) for each in model.modules() if isinstance(each, LowRankFused) for part in each.children()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear | LowRankFused) and id(module) not in within
    }


def was_converted(layer: nn.Module) -> bool:
    """Say whether a low-rank layer stands where a plain one stood."""
    return PLAIN in layer.__dict__


def _parts(layer: nn.Module) -> dict[str, LowRankLinear]:
    if isinstance(layer, LowRankLinear):
        return {"": layer}
    return {name: part for name, part in layer.named_children() if isinstance(part, LowRankLinear)}


def _expect_mergeable(name: str, part: LowRankLinear, fused: bool) -> None:
    for own, factor in (("down", part.down), ("up", part.up)):
        weight = factor._parameters.get("weight")
        if type(factor) is not nn.Linear or weight is None:
            raise ConversionError(f"{name}.{own} is no plain layer: fold what is on it first (tt.fold_ does both)")
        if is_sharded(weight):
            raise ConversionError(f"{name}.{own} is sharded: merge a model of one process with the full state dict")
        if weight.is_meta:
            raise ConversionError(f"{name}.{own} is on the meta device: give it values first")
        if not bool(torch.isfinite(weight).all()):
            raise ConversionError(f"{name}.{own} is not finite: merge a checkpoint from before the run diverged")
        lost = bool(factor._forward_pre_hooks or factor._backward_hooks or factor._backward_pre_hooks)
        if lost or ((own == "down" or fused) and (factor._forward_hooks or factor._modules)):
            raise ConversionError(
                f"{name}.{own} has hooks or layers of its own (as qk-norm puts them), for which the merged layer has "
                "no place"
            )


def _product(layer: nn.Module) -> Tensor:
    """The weights of all parts below each other, (rows, columns)."""
    found = []
    for part in _parts(layer).values():
        up, down = part.up.weight.detach(), part.down.weight.detach()
        wide = up.dtype if up.device.type == "mps" else torch.float64
        found.append((up.to(wide) @ down.to(wide)).to(up.dtype))
    return torch.cat(found)


def _plain_layer(layer: nn.Module) -> nn.Module:
    """The layer that stood there; without one, a new nn.Linear that has yet to get its weight."""
    plain = layer.__dict__.get(PLAIN)
    if plain is None:
        parts = list(_parts(layer).values())
        plain = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), device="meta")
    assert isinstance(plain, nn.Module)
    return plain.train(layer.training)


def _merged(layer: nn.Module, plain: nn.Module, weight: nn.Parameter) -> nn.Module:
    parts = list(_parts(layer).values())
    plain.register_parameter("weight", weight)
    biases = [part.up.bias for part in parts if part.up.bias is not None]
    bias: nn.Parameter | None = biases[0] if biases else None
    if len(biases) > 1:
        bias = nn.Parameter(torch.cat([each.detach() for each in biases]), biases[0].requires_grad)
    plain.register_parameter("bias", bias)
    if len(parts) == 1:
        plain._modules.update(parts[0].up._modules)
        plain._forward_hooks.update(parts[0].up._forward_hooks)
    plain._forward_hooks.update(layer._forward_hooks)
    return plain
