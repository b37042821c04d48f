"""Power iteration of weights that lie in pieces on several processes (FSDP2, tensor parallel).

No weight is gathered. Each process multiplies its own piece; what travels is one sum of all left products and one of
all right products: rows + columns numbers a weight, two reductions for the whole model.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trimtab.spectral.power import Sizes


def sharded_power_iteration(weights: Sequence[tuple[Tensor, Tensor, Sizes]]) -> list[tuple[Tensor, Tensor]]:
    """Return ``(W^T W u, W u)`` per row block for each sharded matrix, whole and the same on every process.

    Args:
        weights: (matrix, u, sizes) for each: matrix a DTensor of shape (rows, columns), u a local tensor of shape
            (blocks, columns), sizes the rows of each block. All processes pass the same weights in the same order.

    Returns:
        For each: shapes (blocks, columns) and (rows,), unnormalised.
    """
    matrices = [cast(DTensor, matrix) for matrix, _, _ in weights]
    pieces = [_local_piece(matrix) for matrix in matrices]
    left = []
    for matrix, (own, row, column), (_, u, sizes) in zip(matrices, pieces, weights, strict=True):
        product = u.new_zeros(matrix.shape[0])
        for block, (start, stop) in enumerate(_block_rows(sizes, row, own.shape[0])):
            if start < stop:
                part = own[start - row : stop - row].to(u.dtype) @ u[block, column : column + own.shape[1]]
                product[start:stop] = part
        left.append(product)
    _sum_over_shards(left, matrices)
    right = []
    for (own, row, column), z, (_, u, sizes) in zip(pieces, left, weights, strict=True):
        products = torch.zeros_like(u)
        for block, (start, stop) in enumerate(_block_rows(sizes, row, own.shape[0])):
            if start < stop:
                part = z[start:stop] @ own[start - row : stop - row].to(u.dtype)
                products[block, column : column + own.shape[1]] = part
        right.append(products)
    _sum_over_shards(right, matrices)
    return list(zip(right, left, strict=True))


def _local_piece(matrix: DTensor) -> tuple[Tensor, int, int]:
    """Return this process's piece of a matrix and the row and column at which it starts."""
    shape, offset = compute_local_shape_and_global_offset(matrix.shape, matrix.device_mesh, matrix.placements)
    own = matrix.to_local()
    row, column = (offset[0], offset[1]) if own.numel() else (0, 0)
    return own.reshape(shape), row, column


def _block_rows(sizes: Sizes, row: int, count: int) -> list[tuple[int, int]]:
    """Return, for each row block, the rows of it that lie in a piece of ``count`` rows starting at ``row``."""
    spans, first = [], 0
    for size in sizes:
        spans.append((max(first, row), min(first + size, row + count)))
        first += size
    return spans


def _sum_over_shards(vectors: list[Tensor], matrices: Sequence[DTensor]) -> None:
    """Sum each vector in place over the mesh dimensions its matrix is sharded on, many vectors in one reduction."""
    together: dict[tuple[object, int, torch.dtype], list[Tensor]] = {}
    for vector, matrix in zip(vectors, matrices, strict=True):
        for dim, placement in enumerate(matrix.placements):
            if isinstance(placement, Shard):
                together.setdefault((matrix.device_mesh, dim, vector.dtype), []).append(vector)
    for (mesh, dim, _), group in together.items():
        flat = torch.cat([vector.flatten() for vector in group])
        dist.all_reduce(flat, group=mesh.get_group(dim))  # type: ignore[attr-defined]
        for vector, summed in zip(group, flat.split([vector.numel() for vector in group]), strict=True):
            vector.copy_(summed.view_as(vector))
