"""Products with weights that lie in pieces on several processes (FSDP2, tensor parallel).

No weight is gathered. Each process multiplies its own piece; what travels is the sum of the products: for k vectors
k (rows + columns) numbers a weight, in two reductions for the whole model (two for each group of processes and each
dtype, where there are several).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trimtab.spectral.exact import Leading, Operator, check_finite, lanczos, largest_entry, tolerance_of
from trimtab.spectral.power import Sizes
from trimtab.spectral.precision import exact_products
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
    """Return what this process holds of each row block of a sharded matrix (a DTensor).

    Raises:
        RuntimeError: if the matrix is cut in a way that is not known.
    """
    sharded = cast(DTensor, matrix)
    own = sharded.to_local().detach()
    (row, rows), (column, columns) = _extent(sharded, 0), _extent(sharded, 1)
    if own.numel() != rows * columns:
        raise RuntimeError(
            f"expected of a weight with placements {sharded.placements} the {rows} rows from {row} and the {columns} "
            f"columns from {column} on this process, got a piece of shape {tuple(own.shape)}: this way of sharding is "
            "not supported"
        )
    own = own.reshape(rows, columns)
    found, first = [], 0
    for size in sizes:
        start, stop = max(first, row), min(first + size, row + rows)
        part = own[start - row : stop - row] if start < stop else own[:0]
        block = (size, matrix.shape[1])
        found.append(Piece(part, start - first if start < stop else 0, column, block, sharded))
        first += size
    return found


def _extent(sharded: DTensor, dim: int) -> tuple[int, int]:
    """Return the first row (``dim`` 0) or column (1) that lies on this process, and how many do."""
    first, count = 0, sharded.shape[dim]
    cuts = [(place, i) for i, place in enumerate(sharded.placements) if getattr(place, "dim", None) == dim]
    # What tensor parallelism cut, fully_shard cuts once more, though its mesh dimension comes first: a strided shard.
    for _, i in sorted(cuts, key=lambda cut: hasattr(cut[0], "split_factor")):
        size = -(-count // sharded.device_mesh.size(i))  # of all pieces but the last ones, as torch.chunk cuts
        start = min(size * sharded.device_mesh.get_local_rank(i), count)
        first, count = first + start, min(size, count - start)
    return first, count


def products_to_rows(parts: Sequence[Piece], vectors: list[Tensor]) -> list[Tensor]:
    """Return the whole ``U W^T`` of every block, the same on every process."""
    own = [part.to_rows(each) for part, each in zip(parts, vectors, strict=True)]
    return _reduced(own, parts, dist.ReduceOp.SUM)


def products_to_columns(parts: Sequence[Piece], vectors: list[Tensor]) -> list[Tensor]:
    """Return the whole ``P W`` of every block, the same on every process."""
    own = [part.to_columns(each) for part, each in zip(parts, vectors, strict=True)]
    return _reduced(own, parts, dist.ReduceOp.SUM)


def sharded_sigma(matrix: Tensor, u: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Return what `trimtab.spectral.block_sigma` does, of a matrix in pieces; every process must ask.

    Args:
        matrix: shape (rows, columns), a DTensor.
        u: right singular vectors, shape (blocks, columns), whole.
        v: left singular vectors, shape (rows,), whole.
        sizes: rows of each block.

    Returns:
        Shape (blocks,), the same on every process.
    """
    parts = pieces(matrix, sizes)
    images = [part.to_rows(right.view(1, 1, -1)).flatten() for part, right in zip(parts, u, strict=True)]
    sums = [(image * left).sum() for image, left in zip(images, v.split(sizes), strict=True)]
    return torch.stack(_reduced(sums, parts, dist.ReduceOp.SUM))


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
    scale = _reduced([torch.where(largest.isnan(), torch.inf, largest)], [part], dist.ReduceOp.MAX)[0]
    check_finite(scale)
    if not bool(scale > 0):
        axes = torch.eye(max(part.shape), dtype=dtype, device=like.device)
        return Leading(scale, axes[:count, : part.shape[1]].clone(), axes[0, : part.shape[0]].clone())

    def agree(decision: bool) -> bool:
        return bool(_reduced([like.new_tensor(float(decision))], [part], dist.ReduceOp.MIN)[0])

    operator = Operator(
        part.shape,
        like,
        lambda u: products_to_rows([part], [u.view(1, 1, -1)])[0].view(-1) / scale,
        lambda v: products_to_columns([part], [v.view(1, 1, -1)])[0].view(-1) / scale,
        agree,
        tolerance_of(part.whole.dtype),
    )
    with exact_products(like.device.type):
        found = lanczos(operator, count, start)
    return found._replace(sigma=found.sigma * scale)


def _reduced(values: list[Tensor], parts: Sequence[Piece], operation: dist.ReduceOp.RedOpType) -> list[Tensor]:
    """Reduce each value over the processes that share its matrix: one reduction for each group of them and dtype."""
    values = list(values)
    together: dict[tuple[str, torch.dtype], tuple[dist.ProcessGroup, list[int]]] = {}
    for i, part in enumerate(parts):
        for dim, placement in enumerate(part.whole.placements):
            if not placement.is_replicate():
                group = part.whole.device_mesh.get_group(dim)
                together.setdefault((group.group_name, values[i].dtype), (group, []))[1].append(i)
    for group, members in together.values():
        flat = torch.cat([values[i].flatten() for i in members])
        dist.all_reduce(flat, operation, group=group)
        for i, reduced in zip(members, flat.split([values[i].numel() for i in members]), strict=True):
            values[i] = reduced.view_as(values[i])
    return values
