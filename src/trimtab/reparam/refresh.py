"""Moving the vectors of converted weights along with them, all weights of a model at once."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.reparam.carried import Carried, is_sharded, local
from trimtab.spectral import block_iteration, full_precision, is_even, thin_product

# A weight of fewer entries is copied beside others of its shape: one product for all of them then costs less than the
# launch of one for each.
_STACK_BELOW = {"cpu": 2**16}
_STACK_BELOW_ELSEWHERE = 2**20


class _Stack(NamedTuple):
    """Row blocks of one shape, (B, rows, columns), with their basis (B, vectors, columns) and v (B, rows)."""

    blocks: Tensor
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
        for c in {c.weight.device.type: c for c in firsts}.values():
            contexts.enter_context(full_precision(c.weight))
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
    for members, (basis, v) in zip(groups.values(), moved, strict=True):
        counts = [len(stack.blocks) for stack in members]
        for stack, own_basis, own_v in zip(members, basis.split(counts), v.split(counts), strict=True):
            _store_(stack.basis, stack.v, own_basis, own_v)


def _refresh_sharded_(carried: list[Carried]) -> None:
    if not carried:
        return
    from trimtab.spectral.sharded import pieces, products_to_columns, products_to_rows

    parts = [part for c in carried for part in pieces(c.matrix, c.sizes)]
    moved = block_iteration(
        [basis for c in carried for basis in local(c.basis).split(1)],
        lambda vectors: products_to_rows(parts, vectors),
        lambda vectors: products_to_columns(parts, vectors),
    )
    stored = [pair for c in carried for pair in zip(local(c.basis).split(1), local(c.v).split(c.sizes), strict=True)]
    for (basis, v), (new_basis, new_v) in zip(stored, moved, strict=True):
        _store_(basis, v.unsqueeze(0), new_basis, new_v)


def _store_(basis: Tensor, v: Tensor, new_basis: Tensor, new_v: Tensor) -> None:
    basis.copy_(new_basis)
    v.copy_(torch.where(new_v.isnan(), v, new_v))
