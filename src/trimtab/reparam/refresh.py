"""Moving the vectors of converted weights along with them, all weights of a model at once."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trimtab.reparam.carried import Carried, is_sharded, local
from trimtab.spectral import block_iteration, is_even, thin_product, without_autocast
from trimtab.spectral.iteration import Products

if TYPE_CHECKING:
    from trimtab.spectral.sharded import Piece

# A weight of fewer entries is copied beside others of its shape: one product for all of them then costs less than the
# launch of one for each.
_STACK_BELOW = {"cpu": 2**16}
_STACK_BELOW_ELSEWHERE = 2**20


class _Stack(NamedTuple):
    """Row blocks of one shape, (B, rows, columns), with their basis (B, vectors, columns) and v (B, rows)."""

    blocks: Tensor
    basis: Tensor
    v: Tensor


class _Cut(NamedTuple):
    """What this process holds of one row block of a sharded weight, with all of its basis (1, vectors, columns), v."""

    piece: "Piece"
    basis: Tensor
    v: Tensor


@torch.no_grad()
def refresh_vectors_(carried: Iterable[Carried]) -> None:
    """Move the vectors of each weight by one block iteration; vectors of a weight that several modules carry agree."""
    by_weight: dict[int, list[Carried]] = {}
    for c in carried:
        if not c.weight.is_meta:
            by_weight.setdefault(id(c.weight), []).append(c)
    firsts = [holders[0] for holders in by_weight.values()]
    with ExitStack() as contexts:
        for tensor in {t.device.type: t for c in firsts for t in (c.weight, c.basis)}.values():
            contexts.enter_context(without_autocast(tensor))
        _refresh_stacks_([s for c in firsts if not is_sharded(c.weight) for s in _stacks(c)])
        _refresh_sharded_([c for c in firsts if is_sharded(c.weight)])
    for first, *others in by_weight.values():
        for c in others:
            if c.basis is not first.basis:
                local(c.basis).copy_(local(first.basis))
                local(c.v).copy_(local(first.v))


def _stacks(c: Carried) -> list[_Stack]:
    if is_even(c.sizes):
        shape = (len(c.sizes), c.sizes[0])
        return [_Stack(c.matrix.unflatten(0, shape), c.basis, c.v.view(shape))]
    parts = zip(c.matrix.split(c.sizes), c.basis.split(1), c.v.split(c.sizes), strict=True)
    return [_Stack(block.unsqueeze(0), basis, v.unsqueeze(0)) for block, basis, v in parts]


def _refresh_stacks_(stacks: list[_Stack]) -> None:
    groups: dict[object, list[_Stack]] = {}
    for i, stack in enumerate(stacks):
        size = stack.blocks[0].numel()
        small = size < _STACK_BELOW.get(stack.blocks.device.type, _STACK_BELOW_ELSEWHERE)
        kind = (stack.blocks.shape[1:], stack.basis.shape[1], stack.blocks.dtype, stack.blocks.device)
        groups.setdefault(kind if small else i, []).append(stack)
    merged = [
        members[0] if len(members) == 1 else _Stack(*(torch.cat(parts) for parts in zip(*members, strict=True)))
        for members in groups.values()
    ]
    moved = block_iteration(
        [stack.basis for stack in merged],
        lambda vectors: [thin_product(x, s.blocks.transpose(1, 2)) for x, s in zip(vectors, merged, strict=True)],
        lambda vectors: [thin_product(x, s.blocks) for x, s in zip(vectors, merged, strict=True)],
    )
    _store_(groups.values(), moved)


def _refresh_sharded_(carried: list[Carried]) -> None:
    if not carried:
        return
    from trimtab.spectral.sharded import pieces, products_to_columns, products_to_rows

    groups: dict[object, list[_Cut]] = {}
    for c in carried:
        bases, lefts = local(c.basis).split(1), local(c.v).split(c.sizes)
        for piece, basis, v in zip(pieces(c.matrix, c.sizes), bases, lefts, strict=True):
            kind = (piece.shape, basis.shape[1], basis.dtype, basis.device)
            groups.setdefault(kind, []).append(_Cut(piece, basis, v.unsqueeze(0)))
    parts = [cut.piece for members in groups.values() for cut in members]

    def of_all(products: Callable[[Sequence["Piece"], list[Tensor]], list[Tensor]]) -> Products:
        def multiply(stacked: list[Tensor]) -> list[Tensor]:
            each = iter(products(parts, [own for vectors in stacked for own in vectors.split(1)]))
            return [torch.cat(list(islice(each, len(vectors)))) for vectors in stacked]

        return multiply

    moved = block_iteration(
        [torch.cat([cut.basis for cut in members]) for members in groups.values()],
        of_all(products_to_rows),
        of_all(products_to_columns),
    )
    _store_(groups.values(), moved)


def _store_(groups: Iterable[Sequence[_Stack | _Cut]], moved: list[tuple[Tensor, Tensor]]) -> None:
    """Write the moved vectors of each group, which lie one after the other, where they are kept."""
    for members, (basis, v) in zip(groups, moved, strict=True):
        counts = [len(member.basis) for member in members]
        for member, new_basis, new_v in zip(members, basis.split(counts), v.split(counts), strict=True):
            member.basis.copy_(new_basis)
            member.v.copy_(torch.where(new_v.isnan(), member.v, new_v))
