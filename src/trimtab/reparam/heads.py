"""Where attention modules make each head's queries and keys: in which layer, in which rows of its weight."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from trimtab.reparam.blocks import (
    HEAD_DIM,
    HEADS,
    KEY_HEADS,
    Place,
    children_of,
    features_of_head,
    is_head_by_head,
    is_linear,
    number_told,
    parts_of,
    rows_and_columns,
)
from trimtab.reparam.classes import mixin_of, plain_class_of

# Head by head, but neither (query, key, value) of each head nor (queries of a group, key, value).
_UNKNOWN_ORDER = {"CodeGenAttention", "MiniMaxLightningAttention", "EsmFoldSelfAttention"}


class HeadRows(NamedTuple):
    """The rows that make the queries, or the keys, of one attention module, head after head.

    The rows are in equal groups (one, unless queries and keys take turns); in each, those of some heads stand together.

    Attributes:
        layer: a linear layer, Hugging Face's Conv1D, or an nn.MultiheadAttention.
        weight_name: of the weight in it, whose outputs are its rows.
        bias_name: of the bias.
        heads: how many.
        head_dim: rows of a head.
        start: row of a group at which its first head begins.
        groups: how many.
        bias_offset: row r of the weight goes with entry r + bias_offset of the bias.
    """

    layer: nn.Module
    weight_name: str
    bias_name: str
    heads: int
    head_dim: int
    start: int = 0
    groups: int = 1
    bias_offset: int = 0

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in, out), as Hugging Face's Conv1D does."""
        mixin = mixin_of(plain_class_of(self.layer))
        return mixin is not None and mixin.transposed

    @property
    def stop(self) -> int:
        """Row of a group at which its last head has ended."""
        return self.start + self.heads // self.groups * self.head_dim

    def view(self, rows: Tensor) -> Tensor:
        """View (all rows, ...) as (groups, heads in a group, head_dim, ...)."""
        return rows.unflatten(0, (self.groups, -1))[:, self.start : self.stop].unflatten(1, (-1, self.head_dim))


class Projections(NamedTuple):
    """Where one attention module makes its queries, and keys; query heads share key heads where these are fewer.

    Attributes:
        name: dotted name of the attention module, "" for the model itself.
        holder: the module; it holds the layers, or is an nn.MultiheadAttention.
        query: where the queries are made.
        key: where the keys are made.
    """

    name: str
    holder: nn.Module
    query: HeadRows
    key: HeadRows


def projections(model: nn.Module, heads: Mapping[str, int] | None = None) -> Iterator[Projections]:
    """Find every attention module of a model whose layers are known by their names and its number of heads.

    Known are nn.MultiheadAttention (packed or not); modules that hold one linear layer for queries and one for keys
    under the usual names (q_proj, query, to_q, wq ...); and fused layers (qkv, c_attn, query_key_value ...) in the
    order that `trimtab.reparam.blocks` knows of them, head by head or not: so Hugging Face's GPT-2, BERT, ViT, Llama,
    T5, GPT-NeoX and their kin, timm, and the well-known small GPTs.

    Args:
        model: any model.
        heads: the number of query heads by module name, for modules that do not tell it by an attribute.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield Projections(name, module, *_of_torch(module))
        else:
            found = _of_holder(module, (heads or {}).get(name))
            if found is not None:
                yield Projections(name, module, *found)


def _of_torch(module: nn.MultiheadAttention) -> tuple[HeadRows, HeadRows]:
    size, heads = module.embed_dim, (module.num_heads, module.head_dim)
    if module._qkv_same_embed_dim:
        names = ("in_proj_weight", "in_proj_bias")
        return HeadRows(module, *names, *heads), HeadRows(module, *names, *heads, start=size)
    query = HeadRows(module, "q_proj_weight", "in_proj_bias", *heads)
    return query, HeadRows(module, "k_proj_weight", "in_proj_bias", *heads, bias_offset=size)


def _of_holder(holder: nn.Module, heads: int | None) -> tuple[HeadRows, HeadRows] | None:
    """Out of the layers that a module holds; None where there is not exactly one for each."""
    found: dict[str, list[tuple[nn.Module, int, int]]] = {"query": [], "key": [], "value": []}
    for place, layer, shape in _layers(holder):
        if is_head_by_head(place):
            return _head_by_head(holder, layer, shape[0])
        start = 0
        for role, size in parts_of(place, *shape):
            found[role].append((layer, start, size))
            start += size
    if len(found["query"]) != 1 or len(found["key"]) != 1:
        return None
    (query, first_query, queries), (key, first_key, keys) = found["query"][0], found["key"][0]
    width = features_of_head(holder, "query", queries)
    if not width and heads and queries % heads == 0:
        width = queries // heads
    if not width or queries % width or keys % width or (queries // width) % (keys // width):
        return None
    return (
        HeadRows(query, "weight", "bias", queries // width, width, first_query),
        HeadRows(key, "weight", "bias", keys // width, width, first_key),
    )


def _head_by_head(holder: nn.Module, layer: nn.Module, rows: int) -> tuple[HeadRows, HeadRows] | None:
    """Out of rows q1 k1 v1 | q2 k2 v2 ..., or, where heads share keys, of q1 ... qn k1 v1 | ..."""
    heads, key_heads, width = (number_told(holder, each) for each in (HEADS, KEY_HEADS, HEAD_DIM))
    if _UNKNOWN_ORDER & {cls.__name__ for cls in type(holder).__mro__}:
        return None
    heads = heads or (rows // (3 * width) if width else 0)
    groups = key_heads if key_heads and rows == (heads + 2 * key_heads) * (width or 0) else heads
    if not groups:
        return None
    count = heads // groups  # query heads in a group, after which come one key and one value
    if heads % groups or rows % (groups * (count + 2)):
        return None
    width = rows // (groups * (count + 2))
    query = HeadRows(layer, "weight", "bias", heads, width, groups=groups)
    return query, HeadRows(layer, "weight", "bias", groups, width, start=count * width, groups=groups)


def _layers(holder: nn.Module) -> Iterator[tuple[Place, nn.Module, tuple[int, int]]]:
    """The linear layers that make a module's projections, each with the rows (outputs) and columns of its weight."""
    for name, child in children_of(holder):
        if is_linear(child):
            weight = getattr(child, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
                yield Place(holder, name), child, rows_and_columns(child, weight)
