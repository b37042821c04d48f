"""Where a model keeps its W_q and W_k: each head's rows, out of separate, packed and fused projections."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trimtab.reparam import effective_weight
from trimtab.reparam.blocks import (
    HEAD_DIM,
    HEADS,
    KEY_HEADS,
    Place,
    features_of_head,
    is_head_by_head,
    is_linear,
    number_told,
    parts_of,
    rows_and_columns,
)
from trimtab.reparam.carried import is_sharded
from trimtab.watch.signals.spectra import qk_energy

# Head by head, but neither (query, key, value) of each head nor (queries of a group, key, value).
_UNKNOWN_ORDER = {"CodeGenAttention", "MiniMaxLightningAttention", "EsmFoldSelfAttention"}


class QKWeights(NamedTuple):
    """W_q of one attention module, shape (H, d_head, d_model), and its W_k, (H_kv, d_head, d_model of the keys)."""

    query: Tensor
    key: Tensor


@torch.no_grad()
def qk_weights(model: nn.Module, heads: Mapping[str, int] | None = None) -> dict[str, QKWeights]:
    """W_q and W_k of every attention module whose projections are known, by its dotted name, or "" for the model.

    Known are nn.MultiheadAttention (packed or not); modules that hold one linear layer for queries and one for keys
    under the usual names (q_proj, query, to_q, wq ...); and fused layers (qkv, c_attn, query_key_value ...) in the
    order that `trimtab.reparam.blocks` knows of them, head by head or not: so Hugging Face's GPT-2, BERT, ViT, Llama,
    T5, GPT-NeoX and their kin, timm, and the well-known small GPTs. Of converted layers it is the weight in use.

    Args:
        model: any model. Biases, rotary embeddings and norms of queries and keys are no part of these weights.
        heads: the number of query heads by module name, for modules that do not tell it by an attribute (attention
            readings do).

    Returns:
        Modules whose projections cannot be told apart, are sharded, quantised or wrapped (LoRA) are left out.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            weights = _of_torch(module)
        else:
            weights = _of_holder(module, (heads or {}).get(name))
        if weights is not None:
            found[name] = QKWeights(*(weight.detach() for weight in weights))
    return found


def qk_energies(model: nn.Module, heads: Mapping[str, int] | None = None, top: int = 1) -> dict[str, list[float]]:
    """`qk_energy` of each head of every attention module that `qk_weights` knows, by the module's dotted name."""
    return {name: qk_energy(*weights, top=top).tolist() for name, weights in qk_weights(model, heads).items()}


def _of_torch(module: nn.MultiheadAttention) -> tuple[Tensor, Tensor] | None:
    if module._qkv_same_embed_dim:
        packed = _in_use(module, "in_proj_weight")
        query, key = (None, None) if packed is None else packed.chunk(3)[:2]
    else:
        query, key = (_in_use(module, f"{part}_proj_weight") for part in "qk")
    return None if query is None or key is None else _split(query, key, module.head_dim)


def _of_holder(holder: nn.Module, heads: int | None) -> tuple[Tensor, Tensor] | None:
    """Queries and keys out of the layers that a module holds; None where there is not exactly one of each."""
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    for place, layer, shape in _layers(holder):
        if is_head_by_head(place):
            return _head_by_head(place, layer, shape)
        parts = parts_of(place, *shape)
        weight = _in_use(layer, "weight") if {"query", "key"} & {role for role, _ in parts} else None
        if weight is not None:
            for (role, _), rows in zip(parts, _rows(weight, shape).split([n for _, n in parts]), strict=True):
                if role != "value":
                    (queries if role == "query" else keys).append(rows)
    if len(queries) != 1 or len(keys) != 1:
        return None
    query, key = queries[0], keys[0]
    width = features_of_head(holder, "query", len(query))
    if not width and heads and len(query) % heads == 0:
        width = len(query) // heads
    return _split(query, key, width)


def _head_by_head(place: Place, layer: nn.Module, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Out of rows q1 k1 v1 | q2 k2 v2 ..., or, where heads share keys, of q1 ... qn k1 v1 | ..."""
    holder = place.holder
    heads, key_heads, width = (number_told(holder, each) for each in (HEADS, KEY_HEADS, HEAD_DIM))
    weight = _in_use(layer, "weight")
    if weight is None or _UNKNOWN_ORDER & {cls.__name__ for cls in type(holder).__mro__}:
        return None
    rows = _rows(weight, shape)
    heads = heads or (len(rows) // (3 * width) if width else 0)
    groups = key_heads if key_heads and len(rows) == (heads + 2 * key_heads) * (width or 0) else heads
    if not groups:
        return None
    count = heads // groups + 2  # rows of so many heads in a group, the last two being key and value
    if heads % groups or len(rows) % (groups * count):
        return None
    grouped = rows.unflatten(0, (groups, count, -1))  # (groups, queries key value, d_head, d_model)
    return grouped[:, :-2].flatten(0, 1), grouped[:, -2]


def _layers(holder: nn.Module) -> Iterator[tuple[Place, nn.Module, tuple[int, int]]]:
    """The linear layers that a module holds itself, each with the rows (outputs) and columns of its weight."""
    for name, child in holder._modules.items():
        if child is not None and is_linear(child):
            weight = child._parameters.get("weight")
            if weight is not None and weight.ndim == 2 and weight.is_floating_point():
                yield Place(holder, name), child, rows_and_columns(child, weight)


def _in_use(layer: nn.Module, name: str) -> Tensor | None:
    """The weight that a layer uses; None if it is not here as a whole."""
    weight = layer._parameters.get(name)
    return None if weight is None or weight.is_meta or is_sharded(weight) else effective_weight(layer, name)


def _rows(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weight with its outputs as rows; Hugging Face's Conv1D holds it (in, out)."""
    return weight if tuple(weight.shape) == shape else weight.t()


def _split(query: Tensor, key: Tensor, width: int | None) -> tuple[Tensor, Tensor] | None:
    """Rows cut into heads; None where they do not fit."""
    if not width or len(query) % width or len(key) % width or (len(query) // width) % (len(key) // width):
        return None
    return query.unflatten(0, (-1, width)), key.unflatten(0, (-1, width))
