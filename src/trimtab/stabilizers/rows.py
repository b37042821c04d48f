"""Rows of a weight, such as those that make the values, multiplied by a number once."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from trimtab.attention.low_rank import LowRankLinear
from trimtab.errors import ConversionError
from trimtab.reparam.blocks import SEPARATE, Place, is_linear, parts_of
from trimtab.reparam.carried import carried_names, is_sharded
from trimtab.reparam.layers import Reparametrized
from trimtab.stabilizers.parts import FUSED_NAMES, is_transposed
from trimtab.stabilizers.weight_norm import weight_normed


class Rows(NamedTuple):
    """Rows start to stop of one weight of a module; rows are outputs."""

    module: nn.Module
    module_name: str
    weight_name: str
    start: int
    stop: int


def all_rows(module: nn.Module, module_name: str, weight_name: str = "weight") -> Rows:
    """Return all rows of a weight."""
    weight: Tensor = getattr(module, weight_name)
    return Rows(module, module_name, weight_name, 0, weight.shape[1 if is_transposed(module) else 0])


def value_rows(holder: nn.Module, name: str, module: nn.Module) -> list[Rows]:
    """Return the rows of an attention's layer that make its values; [] if it makes none.

    Args:
        holder: the module that the layer sits in.
        name: the layer's dotted name.
        module: the layer: a linear one, one of low rank, or nn.MultiheadAttention.

    Raises:
        ConversionError: the layer makes values beside other things, and it is not known in which rows.
    """
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            return [all_rows(module, name, "v_proj_weight")]
        return [Rows(module, name, "in_proj_weight", 2 * module.embed_dim, 3 * module.embed_dim)]
    short = name.rpartition(".")[2]
    if isinstance(module, LowRankLinear):
        return [all_rows(module.up, f"{name}.up")] if short.lower() in SEPARATE["value"] else []
    if not is_linear(module):
        return []
    if short.lower() in SEPARATE["value"]:
        return [all_rows(module, name)]
    if short.lower() in (SEPARATE["query"] | SEPARATE["key"]) - FUSED_NAMES:
        return []
    rows = all_rows(module, name).stop
    weight: Tensor = module.weight  # type: ignore[assignment]
    begin = 0
    for role, size in parts_of(Place(holder, short), rows, weight.numel() // rows):
        if role == "value":
            return [Rows(module, name, "weight", begin, begin + size)]
        begin += size
    if short.lower() in FUSED_NAMES:
        raise ConversionError(f"{name}: it is not known which of its rows make the values")
    return []


def expect_scalable(rows: Rows) -> None:
    """Raise a ConversionError if these rows cannot be multiplied by themselves."""
    name = f"{rows.module_name}.{rows.weight_name}".lstrip(".")
    _gammas(rows)
    weight: Tensor = getattr(rows.module, rows.weight_name)
    if is_sharded(weight):
        raise ConversionError(f"{name} is sharded already: stabilize the model first, then shard")
    if rows.weight_name not in rows.module._parameters and rows.weight_name not in weight_normed(rows.module):
        raise ConversionError(f"{name} is no parameter of its own: take its parametrization (or pruning) off")


def scale_(rows: Rows, factor: float) -> None:
    """Multiply rows of the weight in use: through gamma under sigma-Reparam, through g under weight norm."""
    if isinstance(rows.module, Reparametrized) and rows.weight_name in rows.module._carried_sizes:
        first, last = _gammas(rows)
        rows.module.get_parameter(carried_names(rows.weight_name)[0])[first:last] *= factor
        return
    module: Any = rows.module
    normed = rows.weight_name in weight_normed(module)
    held = module.parametrizations[rows.weight_name].original0 if normed else getattr(module, rows.weight_name)
    (held.t() if is_transposed(module) else held)[rows.start : rows.stop] *= factor


def _gammas(rows: Rows) -> tuple[int, int]:
    """Return which gammas belong to these rows, first and one past the last."""
    if not isinstance(rows.module, Reparametrized) or rows.weight_name not in rows.module._carried_sizes:
        return 0, 0
    edges = [0]
    for size in rows.module._carried_sizes[rows.weight_name]:
        edges.append(edges[-1] + size)
    if rows.start not in edges or rows.stop not in edges:
        raise ConversionError(
            f"{rows.module_name}.{rows.weight_name} has one sigma for values and other things: give each their own"
        )
    return edges.index(rows.start), edges.index(rows.stop)
