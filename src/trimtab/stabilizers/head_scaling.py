"""Scaling the weights of single attention heads so that their logits shrink by a wanted factor."""

import torch
from torch import Tensor, nn

from trimtab.errors import ConversionError
from trimtab.reparam.blocks import rows_and_columns
from trimtab.reparam.carried import carried_names, is_sharded, replica
from trimtab.reparam.heads import HeadRows, Projections
from trimtab.reparam.layers import Reparametrized
from trimtab.stabilizers.places import attention_modules, refuse_norms_of_heads, refuse_soft_cap


def wanted_shrinking(max_logits: Tensor, tau: float) -> Tensor:
    """Return ``min(1, tau / S)`` for the largest logits S of each head; 1 where S is not finite, or not positive."""
    return torch.where(max_logits.isfinite() & (max_logits > tau), tau / max_logits, 1)


def split_over_heads(shrinking: Tensor, key_heads: int) -> tuple[Tensor, Tensor]:
    """Split the factor on each head's logits into one on its queries and one on the keys it shares with others.

    With t the largest factor g of those that share a key head, the keys take sqrt(t), each query g / sqrt(t). Their
    product is g; no factor is above 1, as g <= t <= 1; and if one g of the group is 1, the keys stay as they are, as do
    the queries of all whose g is 1. With one query head for each key head both take sqrt(g).

    Args:
        shrinking: g, (heads,), each in (0, 1].
        key_heads: how many; query heads h n ... h n + n - 1 use key head h.

    Returns:
        Factors of the query heads (heads,) and of the key heads (key_heads,).
    """
    grouped = shrinking.view(key_heads, -1)
    keys = grouped.amax(1).sqrt()
    return (grouped / keys.unsqueeze(1)).flatten(), keys


@torch.no_grad()
def shrink_logits_(attention: Projections, shrinking: Tensor) -> None:
    """Multiply the products of queries and keys by a factor for each head, by scaling the weights of both.

    Of layers under sigma-Reparam the gammas are scaled. Where heads share a gamma, all shrink by the least factor.

    Args:
        attention: where queries and keys are made.
        shrinking: g, (heads,).
    """
    if any(_shares_gamma(rows) for rows in (attention.query, attention.key)):
        shrinking = shrinking.amin().expand_as(shrinking)
    queries, keys = split_over_heads(shrinking, attention.key.heads)
    _scale_(attention.query, queries)
    _scale_(attention.key, keys)
    learned_key = getattr(attention.holder, "bias_k", None)  # nn.MultiheadAttention's add_bias_kv
    if isinstance(attention.holder, nn.MultiheadAttention) and learned_key is not None:
        _multiply_(learned_key, keys.repeat_interleave(attention.key.head_dim))


def scalable_attentions(model: nn.Module) -> list[Projections]:
    """Return the attention modules of a model, whose logits follow the size of weights that can be scaled.

    Raises:
        ConversionError: there is none, or one of which this is not so.
    """
    found = attention_modules(model, "qk-clip")
    for attention in found:
        refuse_norms_of_heads(attention, "the size of W_q and W_k does not count there; leave qk-clip away")
        for owner in (attention.holder, model):
            refuse_soft_cap(owner, attention.name, "it hides the size of the logits; leave qk-clip away")
        for rows in (attention.query, attention.key):
            _refuse_unscalable(rows, attention.name)
    return found


def _refuse_unscalable(rows: HeadRows, name: str) -> None:
    """Raise a ConversionError if the weights of these heads cannot be scaled by themselves."""
    if rows.layer._parameters.get(rows.weight_name) is None:
        raise ConversionError(
            f"{name}: {rows.weight_name} of a {type(rows.layer).__name__} is no parameter of its own (a "
            "parametrization, pruning or weight norm sits on it), so that qk-clip cannot scale it"
        )
    _gammas(rows)


def _scale_(rows: HeadRows, factors: Tensor) -> None:
    weight, bias = (rows.layer._parameters.get(name) for name in (rows.weight_name, rows.bias_name))
    assert weight is not None  # or it would have been refused
    total, _ = rows_and_columns(rows.layer, weight)
    if _has_sigma(rows):
        gamma = rows.layer.get_parameter(carried_names(rows.weight_name)[0])
        blocks = torch.tensor(_gammas(rows), device=factors.device)
        _multiply_(gamma, factors.new_ones(gamma.shape).index_copy(0, blocks, factors))
    else:
        every = factors.new_ones(total)
        rows.view(every).copy_(factors.view(rows.groups, -1, 1))
        _multiply_(weight, every.unsqueeze(0 if rows.transposed else 1))
    if bias is not None:
        every = factors.new_ones(bias.shape)
        rows.view(every[rows.bias_offset : rows.bias_offset + total]).copy_(factors.view(rows.groups, -1, 1))
        _multiply_(bias, every)


def _multiply_(parameter: Tensor, factors: Tensor) -> None:
    factors = factors.to(parameter.device)
    parameter.mul_(replica(factors, parameter) if is_sharded(parameter) else factors)


def _has_sigma(rows: HeadRows) -> bool:
    return isinstance(rows.layer, Reparametrized) and rows.weight_name in rows.layer._carried_sizes


def _shares_gamma(rows: HeadRows) -> bool:
    blocks = _gammas(rows)
    return len(set(blocks)) < len(blocks)


def _gammas(rows: HeadRows) -> list[int]:
    """Return the index of the gamma that belongs to each head; [] without sigma-Reparam.

    Raises:
        ConversionError: a gamma belongs to other rows as well.
    """
    if not isinstance(rows.layer, Reparametrized) or not _has_sigma(rows):
        return []
    sizes = rows.layer._carried_sizes[rows.weight_name]
    block_of_row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    of_heads = rows.view(block_of_row)  # (groups, heads in a group, head_dim)
    counts = torch.bincount(of_heads.flatten(), minlength=len(sizes)).tolist()
    first = of_heads[..., 0].flatten().tolist()
    if bool((of_heads != of_heads[..., :1]).any()) or any(counts[block] != sizes[block] for block in first):
        raise ConversionError(
            f"qk-clip: {rows.weight_name} of a {type(rows.layer).__name__} has one sigma for queries or keys and other "
            'rows: give each their own with blocks="auto" or "heads"'
        )
    return first
