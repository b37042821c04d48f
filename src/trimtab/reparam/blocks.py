"""Which rows of a weight are its blocks: each block has a sigma and a gamma of its own.

Attention layers that hold queries, keys and values in one matrix have their rows in one of two orders. One after the
other (q | k | v): there each part is a block. Or head by head (q1 k1 v1 | q2 k2 v2 ...): a third of those rows mixes
queries, keys and values, so the matrix keeps one sigma unless every head is asked to have its own. No attribute says
which order a model uses: the tables below come from the code of transformers 5, timm, diffusers and the well-known
small GPTs. A fused layer they do not know keeps one sigma.
"""

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from trimtab.attention.low_rank import LowRankFused, LowRankLinear
from trimtab.errors import ConversionError
from trimtab.reparam.classes import mixin_of, plain_class_of
from trimtab.reparam.config import SigmaReparam
from trimtab.spectral import Sizes

_PREFIXES = ("", "to_", "linear_", "project_", "projection_", "w", "w_")
_SUFFIXES = ("", "_proj", "_lin", "_attn", "_b_proj", "_global")


def _spelled(*words: str) -> frozenset[str]:
    return frozenset({p + w for p in _PREFIXES for w in words} | {w + s for s in _SUFFIXES for w in words})


# Names of layers that make queries, keys or values; lower case.
SEPARATE = {"query": _spelled("q", "query"), "key": _spelled("k", "key"), "value": _spelled("v", "value")}
# Names of fused layers: always (k | v), mostly (q | k | v), and those under which both orders are found.
KEY_VALUE = {"kv", "kv_proj", "to_kv"}
FUSED = {"qkv", "qkv_proj", "qkv_linear", "to_qkv", "Wqkv", "W_pack", "c_attn", "att_proj", "in_proj_qkv"}
_EITHER = {"query_key_value", "linear_qkv", "wqkv"}
# Attention classes, and the layer in them, that go head by head.
_HEAD_BY_HEAD = {
    ("BloomAttention", "query_key_value"),
    ("CodeGenAttention", "qkv_proj"),
    ("DisentangledSelfAttention", "in_proj"),  # DeBERTa
    ("EsmFoldSelfAttention", "proj"),
    ("FalconAttention", "query_key_value"),
    ("GPTBigCodeAttention", "c_attn"),
    ("GPTNeoXAttention", "query_key_value"),
    ("GPTNeoXJapaneseAttention", "query_key_value"),
    ("MiniMaxLightningAttention", "qkv_proj"),
    ("PersimmonAttention", "query_key_value"),
}
# Layers whose parts, or one head's parts, are of unequal size: the attributes that hold those sizes.
_UNEQUAL_PARTS = {"in_proj_qkv": ("key_dim", "key_dim", "value_dim")}  # the linear attention of Qwen 3.5
_UNEQUAL_HEADS = {
    "qkv": ("key_dim", "key_dim", "val_dim"),  # timm: LeViT, TinyViT, EfficientFormer
    "kv_b_proj": ("qk_nope_head_dim", "v_head_dim"),  # multi-head latent attention
}
# Attributes by which attention modules tell the features of a head, the number of heads, and that of key-value heads.
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "dim_head", "head_width", "key_value_proj_dim")
_HEAD_DIM_OF = {
    "query": ("qk_head_dim", "head_k_dim", "qk_channels_per_head", *HEAD_DIM),
    "key": ("qk_head_dim", "head_k_dim", "qk_channels_per_head", *HEAD_DIM),
    "value": ("v_head_dim", "head_v_dim", "v_channels_per_head", *HEAD_DIM),
}
HEADS = ("num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head", "heads", "nhead")
KEY_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "n_kv_head",
    "num_heads_kv",
    "kv_heads",
    "kv_n_heads",
)


class Place(NamedTuple):
    """Where a layer sits: the module that holds it, and the name it has there."""

    holder: nn.Module
    name: str


Part = tuple[str, int]
"""What some consecutive rows make ("query", "key" or "value"), and how many they are."""


def places(model: nn.Module) -> dict[int, Place]:
    """Return where each module of a model sits, by its id.

    What a LoRA layer wraps sits where that layer does, as do the last factor of a low-rank one and the parts of a fused
    one.
    """
    found: dict[int, Place] = {}
    for holder in model.modules():
        for name, child in holder._modules.items():
            if child is not None:
                found.setdefault(id(child), _place(holder, name, found.get(id(holder))))
    return found


def _place(holder: nn.Module, name: str, around: Place | None) -> Place:
    if around is not None and isinstance(holder, LowRankFused):
        return Place(around.holder, name)
    wrapped = name == "base_layer" or (name == "up" and isinstance(holder, LowRankLinear))
    return around if around is not None and wrapped else Place(holder, name)


def children_of(holder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of a module by name; of one of low rank the layer whose rows are its outputs."""
    for name, child in holder._modules.items():
        if isinstance(child, LowRankFused):
            yield from children_of(child)
        elif child is not None:
            yield name, child.up if isinstance(child, LowRankLinear) else child


def block_sizes(
    layer: nn.Module, layer_name: str, matrix: tuple[int, int], place: Place | None, config: SigmaReparam
) -> Sizes:
    """Return the rows of each block of one weight; () where "heads" is asked for and no head can be told.

    Args:
        layer: the layer that holds the weight.
        layer_name: its dotted name.
        matrix: rows and columns of the weight, rows being outputs.
        place: where the layer sits, if not at the root.
        config: its ``blocks`` decides.

    Raises:
        ConversionError: if ``config.blocks`` is a function and its answer does not fit the weight.
    """
    rows, columns = matrix
    if callable(config.blocks):
        answer = config.blocks(layer, layer_name)
        if answer is not None:
            return _checked(answer, layer, layer_name, rows)
    if config.blocks == "one":
        return (rows,)
    if isinstance(layer, nn.MultiheadAttention):
        step = layer.head_dim if config.blocks == "heads" else layer.embed_dim
        return (step,) * (rows // step)
    parts = parts_of(place, rows, columns) if place is not None and is_linear(layer) else []
    if config.blocks != "heads":
        return tuple(size for _, size in parts) or (rows,)
    return _heads(place, parts, rows) if place is not None and is_linear(layer) else ()


def _checked(answer: int | Sequence[int], layer: nn.Module, layer_name: str, rows: int) -> Sizes:
    """Turn the answer of a user's function into sizes."""
    try:
        if isinstance(answer, Iterable):
            sizes = tuple(operator.index(size) for size in answer)
        else:
            count = 0 if isinstance(answer, bool) else operator.index(answer)
            sizes = (rows // count,) * count if count > 0 else ()
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 1 or sum(sizes) != rows:
        raise ConversionError(
            f"blocks answered {answer!r} for {layer_name or 'the model'}, whose weight has {rows} rows: expected a "
            "number of equal blocks that divides the rows, the rows of each block, which add up to them, or None"
        )
    if len(sizes) > 1 and isinstance(layer, nn.modules.conv._ConvNd):
        raise ConversionError(
            f"blocks answered {answer!r} for {layer_name or 'the model'} ({type(layer).__name__}): a convolution has "
            "one block, expected 1 or None"
        )
    return sizes


def parts_of(place: Place, rows: int, columns: int) -> list[Part]:
    """Return what the rows of a layer make, one part after the other; [] where that is not known."""
    for role, names in SEPARATE.items():
        if place.name.lower() in names:
            return [(role, rows)]
    if not _goes_in_sequence(place):
        return []
    unequal = _told_all(place.holder, _UNEQUAL_PARTS.get(place.name))
    if unequal is not None:
        return _named(unequal) if sum(unequal) == rows else []
    heads, key_heads, head_dim = (number_told(place.holder, names) for names in (HEADS, KEY_HEADS, HEAD_DIM))
    if head_dim is None and heads and key_heads and rows % (heads + 2 * key_heads) == 0:
        head_dim = rows // (heads + 2 * key_heads)
    queries = _rows_of_queries(place.holder)
    elsewhere = queries is not None or place.name in KEY_VALUE
    if queries is None and heads and head_dim:
        queries = heads * head_dim
    keys = key_heads * head_dim if key_heads and head_dim else queries
    if keys is None and elsewhere and rows == 2 * columns:
        keys = rows // 2
    if keys is None and not elsewhere and rows >= 3 * columns and rows % (3 * (head_dim or heads or 1)) == 0:
        keys = rows // 3
    if keys is None:
        return []
    if rows == 2 * keys:  # the queries come from elsewhere, whether or not that can be seen
        return _named((keys, keys))
    fits = rows > 2 * keys and queries in (None, rows - 2 * keys) and not elsewhere
    return _named((rows - 2 * keys, keys, keys)) if fits else []


def _named(sizes: Sizes) -> list[Part]:
    return list(zip(("query", "key", "value")[-len(sizes) :], sizes, strict=True))


def is_head_by_head(place: Place) -> bool:
    """Say whether a fused layer is one known to hold the rows of each head together."""
    return any((cls.__name__, place.name) in _HEAD_BY_HEAD for cls in type(place.holder).__mro__)


def _goes_in_sequence(place: Place) -> bool:
    """Say whether a fused layer is known to hold its parts one after the other."""
    holder, name = place
    if number_told(holder, KEY_HEADS) == 1 and name in FUSED | KEY_VALUE | _EITHER:
        return True  # all queries share one key and one value: both orders are the same
    if name not in FUSED | KEY_VALUE or is_head_by_head(place):
        return False
    if getattr(holder, "head_first", False):  # timm's MaxxViT
        return False
    return _told_all(holder, _UNEQUAL_HEADS.get(name)) is None


def _heads(place: Place, parts: list[Part], rows: int) -> Sizes:
    """Return the rows of every head's query, key and value; () where the heads cannot be told."""
    holder, name = place
    unequal = _told_all(holder, _UNEQUAL_HEADS.get(name))
    if unequal is not None:
        return unequal * (rows // sum(unequal)) if rows % sum(unequal) == 0 else ()
    if not parts:  # a head's rows lie together in either order
        head_dim = number_told(holder, HEAD_DIM)
        known = name in FUSED | KEY_VALUE | _EITHER or is_head_by_head(place)
        return (head_dim,) * (rows // head_dim) if known and head_dim and rows % head_dim == 0 else ()
    sizes: Sizes = ()
    for role, size in parts:
        head_dim = features_of_head(holder, role, size)
        if not head_dim or size % head_dim:
            return ()
        sizes += (head_dim,) * (size // head_dim)
    return sizes


def features_of_head(holder: nn.Module, role: str, rows: int) -> int | None:
    """Return the features of one head, given all the rows of a holder's queries, keys or values."""
    told = number_told(holder, _HEAD_DIM_OF[role])
    heads, key_heads = number_told(holder, HEADS), number_told(holder, KEY_HEADS)
    if told or not heads:
        return told
    if role != "query" and key_heads:
        return rows // key_heads if rows % key_heads == 0 else None
    all_rows = rows if role == "query" else _rows_of_queries(holder) or rows
    return all_rows // heads if all_rows % heads == 0 else None


def _rows_of_queries(holder: nn.Module) -> int | None:
    """Return the rows of the layer that makes a holder's queries, if it has one that makes nothing else."""
    for name, child in children_of(holder):
        layer: nn.Module = getattr(child, "base_layer", child)
        if name.lower() in SEPARATE["query"] and is_linear(layer):
            weight = layer._parameters.get("weight")
            return None if weight is None else rows_and_columns(layer, weight)[0]
    return None


def rows_and_columns(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """Return the shape of a weight as a matrix whose rows are outputs."""
    mixin = mixin_of(plain_class_of(module))
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    return (columns, rows) if mixin is not None and mixin.transposed else (rows, columns)


def is_linear(layer: nn.Module) -> bool:
    """Say whether the layer multiplies by one matrix: nn.Linear, Hugging Face's Conv1D, or either converted."""
    mixin = mixin_of(plain_class_of(layer))
    return isinstance(layer, nn.Linear) or (mixin is not None and mixin.transposed)


def number_told(holder: nn.Module, names: Iterable[str]) -> int | None:
    """Return the first of these attributes that is a positive whole number."""
    values = (getattr(holder, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


def _told_all(holder: nn.Module, names: tuple[str, ...] | None) -> Sizes | None:
    """Return all of these attributes, if there are any and all are positive whole numbers."""
    values = [number_told(holder, (name,)) for name in names or ()]
    sizes = tuple(value for value in values if value is not None)
    return sizes if sizes and len(sizes) == len(values) else None
