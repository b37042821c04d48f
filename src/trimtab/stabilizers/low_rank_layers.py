"""Query, key and value layers of an existing model, made of low rank."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from trimtab.attention.low_rank import LowRankFused, LowRankLinear, default_rank, factors
from trimtab.errors import ConversionError
from trimtab.reparam import FilterFn
from trimtab.reparam.blocks import SEPARATE, Part, Place, is_linear, parts_of, rows_and_columns
from trimtab.reparam.carried import is_sharded, memory_of
from trimtab.reparam.convert import expect_module
from trimtab.reparam.layers import Reparametrized
from trimtab.reparam.plan import shared_with
from trimtab.stabilizers.parts import FUSED_NAMES, is_transposed, makes_queries

Start = Literal["svd", "fresh"]

_NAMES = SEPARATE["query"] | SEPARATE["key"] | SEPARATE["value"] | FUSED_NAMES
# Under this name a low-rank layer keeps the one that it replaced, without weight and bias: no child, as it computes
# nothing.
PLAIN = "_plain"


@dataclass(frozen=True)
class LowRankFit:
    """How one matrix was factorised.

    Attributes:
        name: dotted name of its layer, with ".query", ".key" or ".value" for a part of a fused one.
        rank: features between the factors.
        error: ``|W - product| / |W|`` in Frobenius norm; None where the factors were drawn anew.
    """

    name: str
    rank: int
    error: float | None


class _Site(NamedTuple):
    """A layer to replace: its dotted name, itself, and what its rows make."""

    name: str
    layer: nn.Module
    parts: list[Part]

    @property
    def weight(self) -> Tensor:
        weight = self.layer._parameters["weight"]
        assert weight is not None  # or it would have been refused
        return weight


def low_rank_(
    model: nn.Module, rank: int | None = None, *, start: Start = "svd", filter_fn: FilterFn | None = None
) -> tuple[LowRankFit, ...]:
    """Make the query, key and value layers of a model's attention products of two factors, in place.

    Chung et al., EMNLP 2024, arXiv 2409.07787 (multi-head low-rank attention). Each layer becomes a `LowRankLinear`;
    one that makes several of the three, a `LowRankFused` with a product for each. Biases stay the Parameters they are
    (those of a fused layer are cut in parts), dtypes and devices too; weights that are one stay one. Build the
    optimiser afterwards.

    Args:
        model: any model whose projections have the usual names: Trimtab's, Hugging Face's, the well-known small GPTs.
        rank: features between the factors; None is, for each matrix, the largest with which the factors have no more
            entries than it: half the width of a square one.
        start: "svd", the best approximation of the weights there is; or "fresh", factors drawn from N(0, s / sqrt(r)),
            s being the standard deviation of the weight and r the rank, so that the entries of the product have the
            variance of the weight's: for models that have yet to be trained.
        filter_fn: called with (layer, dotted name); only those for which it returns True are taken.

    Returns:
        How each matrix was factorised, in the order of the model's modules.

    Raises:
        ConversionError: no such layer is found, or one that cannot be taken: of another kind (nn.MultiheadAttention,
            LoRA), under sigma-Reparam or a parametrization already, with hooks, sharded, on the meta device, zero, not
            finite, sharing its weight with another layer, of too small a size for the rank. The model is then as it
            was.
        TypeError: the model is not a module, or `rank` not a whole number.
        ValueError: `start` is neither of the two.
    """
    expect_module(model)
    try:
        if isinstance(rank, bool):
            raise TypeError
        rank = None if rank is None else operator.index(rank)  # NumPy's whole numbers are such, too
    except TypeError:
        raise TypeError(f"rank must be a whole number or None, got {rank!r}") from None
    if start not in get_args(Start):
        raise ValueError(f"start must be one of {', '.join(get_args(Start))}; got {start!r}")
    sites = list(_sites(model, filter_fn))
    if not sites:
        raise ConversionError(
            "low-rank finds no attention in this model"
            + (" that filter_fn accepts" if filter_fn is not None else "")
            + ": expected modules that hold their query, key and value projections under the usual names (query, "
            "q_proj, qkv, c_attn ...)"
        )
    shared = shared_with(model, {(id(site.layer), "weight") for site in sites})
    for site in sites:
        _expect_factorable(site, rank, shared)
    fits: list[LowRankFit] = []
    made: dict[int, nn.Module] = {}
    known: dict[int, list[tuple[nn.Parameter, nn.Parameter, LowRankFit]]] = {}  # by the memory of the weight
    with torch.inference_mode(False):  # what is made here will be trained
        for site in sites:
            memory = memory_of(site.weight)
            if memory not in known:
                known[memory] = [_factorised(site, *part, rank, start) for part in _slices(site)]
            named = zip(_slices(site), known[memory], strict=True)
            fits += [replace(fit, name=name) for (name, _), (*_, fit) in named]
            made[id(site.layer)] = _low_rank_layer(site, [(down, up) for down, up, _ in known[memory]])
    for site in sites:
        site.layer._parameters["weight"] = None
        if "bias" in site.layer._parameters:
            site.layer._parameters["bias"] = None
    replace_(model, made)
    return tuple(fits)


def replace_(model: nn.Module, by_id: dict[int, nn.Module]) -> None:
    """Put other modules in the places of some, wherever they are held."""
    for holder in list(model.modules()):
        for name, child in holder._modules.items():
            if child is not None and id(child) in by_id:
                holder._modules[name] = by_id[id(child)]


def _sites(model: nn.Module, filter_fn: FilterFn | None) -> Iterator[_Site]:
    """The layers of every attention that make queries, keys or values, each once."""
    seen: set[int] = set()
    for holder_name, holder in model.named_modules():
        if not makes_queries(holder):
            continue
        if isinstance(holder, nn.MultiheadAttention):
            if filter_fn is None or filter_fn(holder, holder_name):
                raise ConversionError(
                    f"{holder_name or 'the model'} (nn.MultiheadAttention) reads its weights in a forward of its own, "
                    "which knows no factors: use a model with query, key and value layers, or leave it out with "
                    "filter_fn"
                )
            continue
        for own_name, layer in holder._modules.items():
            name = f"{holder_name}.{own_name}".lstrip(".")
            if layer is None or own_name.lower() not in _NAMES or id(layer) in seen:
                continue
            if filter_fn is None or filter_fn(layer, name):
                seen.add(id(layer))
                yield _Site(name, layer, _told_parts(Place(holder, own_name), name, layer))


def _told_parts(place: Place, name: str, layer: nn.Module) -> list[Part]:
    if isinstance(layer, LowRankLinear | LowRankFused):
        raise ConversionError(f"{name} is of low rank already: merge or fold_ it first, or leave it out with filter_fn")
    if isinstance(layer, Reparametrized) or parametrize.is_parametrized(layer):
        raise ConversionError(
            f"{name} has sigma-Reparam or another parametrization on it: apply both at once, as in low-rank+sigma, or "
            "fold_ it first"
        )
    weight = layer._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        raise ConversionError(f"{name} has no weight yet: run one forward first")
    if not is_linear(layer) or weight is None:
        raise ConversionError(
            f"{name} ({type(layer).__name__}) is no plain linear layer, and cannot be factorised: leave it out with "
            "filter_fn"
        )
    parts = parts_of(place, *rows_and_columns(layer, weight))
    if not parts:
        raise ConversionError(
            f"{name}: it is not known which of its rows make queries, keys and values; leave it out with filter_fn"
        )
    return parts


def _expect_factorable(site: _Site, rank: int | None, shared: dict[int, str]) -> None:
    weight, layer, name = site.weight, site.layer, site.name
    if layer._modules or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        raise ConversionError(f"{name} has hooks or layers of its own, which would be lost: apply low-rank first")
    if memory_of(weight) in shared:
        raise ConversionError(f"{name} shares its weight with {shared[memory_of(weight)]}, which would lose it")
    if is_sharded(weight):
        raise ConversionError(f"{name} is sharded already: apply low-rank first, then shard")
    if weight.is_meta:
        raise ConversionError(f"{name} is on the meta device: give it values first")
    if not weight.is_floating_point():
        raise ConversionError(f"{name} is {weight.dtype}: only floating weights can be factorised")
    if not bool(torch.isfinite(weight).all()):
        raise ConversionError(f"{name} is not finite: nothing to factorise")
    for role, part in zip(site.parts, _slices(site), strict=True):
        if not bool(part[1].any()):
            raise ConversionError(
                f"{name} is zero where it makes the {role[0]}: two factors of zero never move. Initialise it first"
            )
        if rank is not None and not 1 <= rank <= min(part[1].shape):
            raise ConversionError(
                f"{name} makes the {role[0]} by {tuple(part[1].shape)}: rank {rank} is not between "
                f"1 and {min(part[1].shape)}"
            )


def _slices(site: _Site) -> Iterator[tuple[str, Tensor]]:
    """The name of each matrix of a layer, and the matrix, (rows, columns)."""
    weight = site.weight.detach()
    matrices = (weight.t() if is_transposed(site.layer) else weight).split([size for _, size in site.parts])
    for (role, _), matrix in zip(site.parts, matrices, strict=True):
        yield (site.name if len(site.parts) == 1 else f"{site.name}.{role}"), matrix


def _factorised(
    site: _Site, name: str, matrix: Tensor, rank: int | None, start: Start
) -> tuple[nn.Parameter, nn.Parameter, LowRankFit]:
    rows, columns = matrix.shape
    rank = default_rank(columns, rows) if rank is None else rank
    if start == "svd":
        up, down, error = factors(matrix, rank)
        fit = LowRankFit(name, rank, error)
    else:
        layer = LowRankLinear(columns, rows, rank, bias=False, device=matrix.device, dtype=matrix.dtype)
        layer.start_(float(matrix.to(torch.promote_types(matrix.dtype, torch.float32)).std(correction=0)))
        up, down, fit = layer.up.weight.detach(), layer.down.weight.detach(), LowRankFit(name, rank, None)
    trained = site.weight.requires_grad
    return nn.Parameter(down, trained), nn.Parameter(up, trained), fit


def _low_rank_layer(site: _Site, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> nn.Module:
    bias = site.layer._parameters.get("bias")
    cut: list[nn.Parameter | None] = [bias] * len(pairs)
    if bias is not None and len(pairs) > 1:
        pieces = bias.detach().split([size for _, size in site.parts])
        cut = [nn.Parameter(piece.clone(), bias.requires_grad) for piece in pieces]
    parts: dict[str, LowRankLinear] = {}
    for (role, _), (down, up), own_bias in zip(site.parts, pairs, cut, strict=True):
        part = LowRankLinear(down.shape[1], up.shape[0], down.shape[0], bias=False, device="meta")
        part.down.weight, part.up.weight = down, up
        part.up.register_parameter("bias", own_bias)
        parts[role] = part
    layer = next(iter(parts.values())) if len(parts) == 1 else LowRankFused(parts)
    layer.__dict__[PLAIN] = site.layer
    return layer.train(site.layer.training)
