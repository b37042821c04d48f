"""Which layers of a Transformer are attention, MLP, or neither; and its blocks.

Told by the shape of the module tree and by the names of projections (`trimtab.reparam.blocks`), for Trimtab's models,
torch's, and those of Hugging Face and timm.
"""

from collections.abc import Callable
from typing import Literal

from torch import nn

from trimtab.attention.low_rank import LowRankFused, LowRankLinear
from trimtab.errors import ConversionError
from trimtab.reparam import FilterFn
from trimtab.reparam.blocks import FUSED, KEY_VALUE, SEPARATE, children_of, is_linear
from trimtab.reparam.classes import mixin_of, plain_class_of
from trimtab.reparam.norms import is_norm

Layers = Literal["all", "blocks", "attention", "mlp"]
"""Every layer; those of the Transformer's blocks, without embedding and head; or only the attention's or MLP's."""

# Layers that make two or three of queries, keys and values; lower case.
FUSED_NAMES = {name.lower() for name in FUSED | KEY_VALUE} | {"query_key_value", "linear_qkv"}
_QUERIES = SEPARATE["query"] | FUSED_NAMES
# What the last layer of a residual branch is called.
ATTENTION_ENDS = {"out", "out_proj", "o_proj", "o", "c_proj", "proj", "wo", "out_lin", "to_out", "dense"}
MLP_ENDS = {"down", "down_proj", "c_proj", "fc2", "linear2", "lin2", "wo", "w2", "dense_4h_to_h", "output_dense"}
MLP_ENDS |= {"ffn_output"}  # ALBERT
_OF_ATTENTION = _QUERIES | SEPARATE["key"] | SEPARATE["value"] | ATTENTION_ENDS


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules by name: the outermost that is called so and makes queries.

    A module that makes queries is one with a layer named as a query or fused projection, or nn.MultiheadAttention. What
    is around it counts as attention while its class is called so (BertAttention holds BertSelfAttention and the output
    projection).
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if not makes_queries(module):
            continue
        around = name
        for holder in _upwards(name)[1:]:
            if "attention" not in type(modules[holder]).__name__.lower() or _has_norm(modules[holder]):
                break  # a whole layer, with its norm, may also be called so
            around = holder
        found[around] = modules[around]
    return found


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the Transformer blocks by name: torch's layers, or the entries of lists that hold attention and an MLP."""
    modules = dict(model.named_modules())
    around = (next((up for up in _upwards(name) if _is_block(modules, up, name)), None) for name in attentions(model))
    return {name: modules[name] for name in around if name is not None}


def attention_of(model: nn.Module) -> Callable[[str], bool]:
    """Return what says of a dotted name whether it belongs to an attention.

    In a block that makes its queries itself, without a module for its attention, the names of the layers tell; the
    factors of one of low rank go by its name.
    """
    inside, around = attentions(model), blocks(model)
    apart = tuple(name for name in inside if name not in around)
    low_rank = [name for name, each in model.named_modules() if isinstance(each, LowRankLinear | LowRankFused)]

    def belongs(name: str) -> bool:
        name = next((each for each in low_rank if is_within(name, (each,))), name)
        holder, _, short = name.rpartition(".")
        return is_within(name, apart) or (holder in inside and holder not in apart and short.lower() in _OF_ATTENTION)

    return belongs


def layers_filter(model: nn.Module, layers: Layers) -> FilterFn | None:
    """Return a filter by dotted name for the layers meant; None for all.

    Raises:
        ConversionError: no Transformer block is found, so that attention and MLP cannot be told apart.
    """
    if layers == "all":
        return None
    around, of_attention = tuple(blocks(model)), attention_of(model)
    if not around:
        raise ConversionError(
            f"layers={layers} finds no Transformer block: no list of this model holds modules with attention and "
            "linear layers. Use layers=all, or tt.reparametrize_ with a filter_fn of your own"
        )

    def is_meant(module: nn.Module, name: str) -> bool:
        attention = of_attention(name)
        if layers == "attention":
            return attention
        return is_within(name, around) and not (layers == "mlp" and attention)

    return is_meant


def is_within(name: str, around: tuple[str, ...]) -> bool:
    """Say whether a dotted name is one of those given, or lies inside one."""
    return any(not each or name == each or name.startswith(each + ".") for each in around)


def is_transposed(module: nn.Module) -> bool:
    """Say whether a layer is Hugging Face's Conv1D, whose weight is stored (in, out)."""
    mixin = mixin_of(plain_class_of(module))
    return mixin is not None and mixin.transposed


def makes_queries(module: nn.Module) -> bool:
    """Say whether a module holds a layer that makes queries, or is nn.MultiheadAttention."""
    if isinstance(module, LowRankFused):  # one layer of the attention that holds it
        return False
    return isinstance(module, nn.MultiheadAttention) or any(
        name.lower() in _QUERIES and is_linear(getattr(child, "base_layer", child))
        for name, child in children_of(module)
    )


def _has_norm(module: nn.Module) -> bool:
    return any(child is not None and is_norm(child) for child in module._modules.values())


def _is_block(modules: dict[str, nn.Module], name: str, attention: str) -> bool:
    """Say whether a module around an attention is a Transformer block."""
    block = modules[name]
    if isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return True
    if not name or not isinstance(modules[_parent(name)], nn.ModuleList | nn.Sequential | nn.ModuleDict):
        return False
    if name == attention:  # it makes queries itself
        own_names = {own.lower() for own, each in block.named_children() if is_linear(each)}
        return bool(own_names & (MLP_ENDS - ATTENTION_ENDS))
    inside = attention[len(name) :].lstrip(".")  # T5's blocks are lists, too, whose entries hold one thing each
    return any(is_linear(each) and not is_within(own, (inside,)) for own, each in block.named_modules())


def _upwards(name: str) -> list[str]:
    """Return a dotted name, that of its parent, and so on up to that of the root, ""."""
    return [name, *_upwards(_parent(name))] if name else [""]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
