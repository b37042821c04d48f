"""Products with weights that lie in pieces on several processes (FSDP2, tensor parallel).

No weight is gathered. Each process multiplies its own piece; what travels is the sum of the products: for k vectors
k (rows + columns) numbers a weight, in two reductions for the whole model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trimtab.spectral.exact import Leading, Operator, check_finite, lanczos, largest_entry
from trimtab.spectral.power import Sizes
from trimtab.spectral.products import thin_product


@dataclass(frozen=True)
class Piece:
    """What this process holds of one row block of a sharded matrix.

    Attributes:
        own: the rows and columns that lie here, possibly none.
        row: the first of them, counted from the start of the block.
        column: the first column that lies here.
        shape: rows and columns of the whole block.
        whole: the sharded matrix.
    """

    own: Tensor
    row: int
    column: int
    shape: tuple[int, int]
    whole: DTensor

    def to_rows(self, vectors: Tensor) -> Tensor:
        """Return this process's part of ``U W^T``: (1, k, columns) to (1, k, rows)."""
        product = vectors.new_zeros(1, vectors.shape[1], self.shape[0])
        if self.own.numel():
            rows, columns = self.own.shape
            part = vectors[:, :, self.column : self.column + columns].to(self.own.device)
            product[:, :, self.row : self.row + rows] = thin_product(part, self.own.t().unsqueeze(0))
        return product

    def to_columns(self, vectors: Tensor) -> Tensor:
        """Return this process's part of ``P W``: (1, k, rows) to (1, k, columns)."""
        product = vectors.new_zeros(1, vectors.shape[1], self.shape[1])
        if self.own.numel():
            rows, columns = self.own.shape
            part = vectors[:, :, self.row : self.row + rows].to(self.own.device)
            product[:, :, self.column : self.column + columns] = thin_product(part, self.own.unsqueeze(0))
        return product


def pieces(matrix: Tensor, sizes: Sizes) -> list[Piece]:
    """Return what this process holds of each row block of a sharded matrix (a DTensor)."""
    sharded = cast(DTensor, matrix)
    shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    own = sharded.to_local().detach().reshape(shape)
    row, column = (offset[0], offset[1]) if own.numel() else (0, 0)
    found, first = [], 0
    for size in sizes:
        start, stop = max(first, row), min(first + size, row + own.shape[0])
        part = own[start - row : stop - row] if start < stop else own[:0]
        block = (size, matrix.shape[1])
        found.append(Piece(part, start - first if start < stop else 0, column, block, sharded))
        first += size
    return found


def products_to_rows(parts: Sequence[Piece], vectors: list[Tensor]) -> list[Tensor]:
    """Return the whole ``U W^T`` of every block, the same on every process."""
    return _summed([part.to_rows(own) for part, own in zip(parts, vectors, strict=True)], parts)


def products_to_columns(parts: Sequence[Piece], vectors: list[Tensor]) -> list[Tensor]:
    """Return the whole ``P W`` of every block, the same on every process."""
    return _summed([part.to_columns(own) for part, own in zip(parts, vectors, strict=True)], parts)


def sharded_leading(part: Piece, count: int, start: Tensor | None = None) -> Leading:
    """Return what `trimtab.spectral.leading` does, of a block in pieces; every process must ask.

    Args:
        part: what this process holds.
        count: right vectors wanted.
        start: as for `trimtab.spectral.leading`, the same on every process.

    Raises:
        ValueError: on every process, if the matrix holds NaN or inf on any.
    """
    dtype = torch.promote_types(part.whole.dtype, torch.float32)
    like = torch.empty(0, dtype=dtype, device=part.whole.device_mesh.device_type)
    largest = largest_entry(part.own).to(like) if part.own.numel() else like.new_zeros(())
    # A maximum may lose a NaN on its way through the processes; inf it cannot lose.
    largest = torch.where(largest.isnan(), torch.inf, largest).reshape(1)
    _reduce([largest], [part], dist.ReduceOp.MAX)
    scale = largest[0]
    check_finite(scale)
    if not bool(scale > 0):
        axes = torch.eye(max(part.shape), dtype=dtype, device=like.device)
        return Leading(scale, axes[:count, : part.shape[1]].clone(), axes[0, : part.shape[0]].clone())

    def agree(decision: bool) -> bool:
        least = like.new_tensor([float(decision)])
        _reduce([least], [part], dist.ReduceOp.MIN)
        return bool(least)

    operator = Operator(
        part.shape,
        like,
        lambda u: products_to_rows([part], [u.view(1, 1, -1)])[0].view(-1) / scale,
        lambda v: products_to_columns([part], [v.view(1, 1, -1)])[0].view(-1) / scale,
        agree,
    )
    found = lanczos(operator, count, start)
    return found._replace(sigma=found.sigma * scale)


def _summed(products: list[Tensor], parts: Sequence[Piece]) -> list[Tensor]:
    _reduce(products, parts, dist.ReduceOp.SUM)
    return products


def _reduce(values: list[Tensor], parts: Sequence[Piece], operation: dist.ReduceOp.RedOpType) -> None:
    """Reduce each value in place over the processes that share its matrix: one reduction for each group of them."""
    together: dict[tuple[str, torch.dtype], tuple[dist.ProcessGroup, list[Tensor]]] = {}
    for value, part in zip(values, parts, strict=True):
        for dim, placement in enumerate(part.whole.placements):
            if not placement.is_replicate():  # fully_shard over tensor parallelism has a kind of shard of its own
                group = part.whole.device_mesh.get_group(dim)
                together.setdefault((group.group_name, value.dtype), (group, []))[1].append(value)
    for group, members in together.values():
        flat = torch.cat([value.flatten() for value in members])
        dist.all_reduce(flat, operation, group=group)
        for value, reduced in zip(members, flat.split([value.numel() for value in members]), strict=True):
            value.copy_(reduced.view_as(value))
