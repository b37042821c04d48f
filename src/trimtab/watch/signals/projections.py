"""Where a model keeps its W_q and W_k: each head's rows, out of separate, packed and fused projections."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trimtab.attention.low_rank import LowRankLinear
from trimtab.reparam import effective_weight
from trimtab.reparam.carried import is_sharded
from trimtab.reparam.heads import HeadRows, projections
from trimtab.watch.signals.spectra import qk_energy


class QKWeights(NamedTuple):
    """W_q of one attention module, shape (H, d_head, d_model), and its W_k, (H_kv, d_head, d_model of the keys)."""

    query: Tensor
    key: Tensor


@torch.no_grad()
def qk_weights(model: nn.Module, heads: Mapping[str, int] | None = None) -> dict[str, QKWeights]:
    """W_q and W_k of every attention module that `trimtab.reparam.heads` knows, by dotted name, or "" for the model.

    Of converted layers it is the weight in use, of low-rank ones the product of both factors.

    Args:
        model: any model. Biases, rotary embeddings and norms of queries and keys are no part of these weights.
        heads: the number of query heads by module name, for modules that do not tell it by an attribute (attention
            readings do).

    Returns:
        Modules whose projections cannot be told apart, are sharded, quantised or wrapped (LoRA) are left out.
    """
    found = {}
    firsts = {id(each.up): each.down for each in model.modules() if isinstance(each, LowRankLinear)}
    for name, _, query, key in projections(model, heads):
        weights = [_in_use(rows, firsts.get(id(rows.layer))) for rows in (query, key)]
        if weights[0] is not None and weights[1] is not None:
            found[name] = QKWeights(weights[0], weights[1])
    return found


def qk_energies(model: nn.Module, heads: Mapping[str, int] | None = None, top: int = 1) -> dict[str, list[float]]:
    """`qk_energy` of each head of every attention module that `qk_weights` knows, by the module's dotted name."""
    return {name: qk_energy(*weights, top=top).tolist() for name, weights in qk_weights(model, heads).items()}


def _in_use(rows: HeadRows, first: nn.Module | None) -> Tensor | None:
    """The weight in use, (heads, d_head, d_model), detached; None if it is not here as a whole.

    Args:
        rows: of which layer and weight.
        first: the layer before it, if the weight is but the last of two factors.
    """
    used = _whole(rows.layer, rows.weight_name)
    if used is None:
        return None
    used = used.t() if rows.transposed else used
    if first is not None:
        factor = _whole(first, "weight")
        if factor is None:
            return None
        wide = torch.promote_types(used.dtype, torch.float32)
        used = used.to(wide) @ factor.to(wide)
    return rows.view(used).flatten(0, 1)


def _whole(layer: nn.Module, weight_name: str) -> Tensor | None:
    weight = layer._parameters.get(weight_name)
    if weight is None or weight.is_meta or is_sharded(weight):
        return None
    return effective_weight(layer, weight_name).detach()
