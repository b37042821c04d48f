"""The climb of SAM: weights moved uphill, as far as a ball reaches, and put back to the bit.

Foret et al. (arXiv 2010.01412, equation 2 with p = 2): ``e = rho g / |g|``. In the adaptive ball of Kwon et al. (arXiv
2102.11600, algorithm 1) it is ``e = rho T² g / |T g|``, where T multiplies each entry of the gradient by |w| + eta.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.reparam.carried import is_sharded, local
from trimtab.spectral.norms import norms


class Uphill(NamedTuple):
    """Where one parameter is to be moved.

    Attributes:
        weight: what of it lies on this process; live.
        rows: where the gradient is sparse, the indices that it has entries for, the only ones that move.
        direction: g, or T² g, of the shape of the weight, or of those entries.
        rho: radius of the ball, in the parameter's group.
    """

    weight: Tensor
    rows: tuple[Tensor, ...] | None
    direction: Tensor
    rho: float


class Kept(NamedTuple):
    """The weights before a climb: all of them, or those entries that a sparse gradient has moved."""

    weight: Tensor
    rows: tuple[Tensor, ...] | None
    before: Tensor


def uphill(groups: Sequence[dict[str, Any]]) -> tuple[list[Uphill], float]:
    """Return the directions of all parameters that have a gradient, and the norm |g|, or |T g|, of them together.

    The gradients of an adaptive group are used up. Of sharded parameters every process must ask; the norm is that of
    the whole.

    Args:
        groups: of an optimiser, each with its ``rho`` and ``eta``; eta None leaves T = 1.
    """
    pairs = [(p, p.grad.detach(), group) for group in groups for p in group["params"] if p.grad is not None]
    gradients = [_as_the_weight(gradient, p) for p, gradient, _ in pairs]
    found = [
        Uphill(local(p.detach()), _rows(gradient), _numbers(gradient), group["rho"])
        for (p, _, group), gradient in zip(pairs, gradients, strict=True)
    ]
    by_eta: dict[float, list[Uphill]] = {}
    for each, (_, _, group) in zip(found, pairs, strict=True):
        if group["eta"] is not None and each.direction.numel():
            by_eta.setdefault(group["eta"], []).append(each)
    stretches = [(_stretch(members, eta), [each.direction for each in members]) for eta, members in by_eta.items()]
    for stretch, directions in stretches:
        torch._foreach_mul_(directions, stretch)
    length = norms(gradients).square().sum().sqrt().item()
    for stretch, directions in stretches:
        torch._foreach_mul_(directions, stretch)
    return found, length


def climb_(directions: Sequence[Uphill], length: float) -> list[Kept]:
    """Move the weights by ``rho / length`` times their directions; return what puts them back.

    An error, such as of memory, leaves them as they were.
    """
    moved = [each for each in directions if each.rho > 0 and length > 0 and each.direction.numel()]
    kept = [Kept(each.weight, each.rows, _taken(each).clone()) for each in moved]
    alike: dict[object, list[Uphill]] = {}  # torch has a quick way for tensors of one kind
    try:
        for each, own in zip(moved, kept, strict=True):
            factor = each.rho / length
            if factor > torch.finfo(each.weight.dtype).max:  # a small gradient; in half precision not even a very small
                wide = own.before.to(torch.promote_types(own.before.dtype, torch.float64))
                each.weight[each.rows or ...] = wide.add(each.direction, alpha=factor).to(own.before)
            elif each.rows is None:
                alike.setdefault((each.weight.device, each.weight.dtype, each.rho), []).append(each)
            else:
                each.weight[each.rows] = own.before.add(each.direction, alpha=factor)
        for members in alike.values():
            weights, steps = [each.weight for each in members], [each.direction for each in members]
            torch._foreach_add_(weights, steps, alpha=members[0].rho / length)
    except BaseException:
        put_back_(kept)
        raise
    return kept


def put_back_(kept: Sequence[Kept]) -> None:
    """Give the weights the values they had before a climb."""
    for weight, rows, before in kept:
        if rows is None:
            weight.copy_(before)
        else:
            weight[rows] = before


def _as_the_weight(gradient: Tensor, parameter: nn.Parameter) -> Tensor:
    """The gradient, cut and added up as its parameter is."""
    if gradient.is_sparse:
        return gradient.coalesce()
    if is_sharded(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        return gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return gradient


def _rows(gradient: Tensor) -> tuple[Tensor, ...] | None:
    return tuple(gradient.indices()) if gradient.is_sparse else None


def _numbers(gradient: Tensor) -> Tensor:
    return gradient.values() if gradient.is_sparse else local(gradient)


def _taken(each: Uphill) -> Tensor:
    return each.weight if each.rows is None else each.weight[each.rows]


def _stretch(members: Sequence[Uphill], eta: float) -> list[Tensor]:
    """T of each: |w| + eta."""
    found = list(torch._foreach_abs([_taken(each) for each in members]))
    torch._foreach_add_(found, eta)
    return found
