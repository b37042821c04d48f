"""Sigma of a weight from the singular vectors it carries, and the power iteration that moves those vectors.

A matrix may be cut into blocks of rows (query | key | value), each with a sigma of its own. ``sizes`` gives the rows of
each block; u holds one right vector per block, v the left vectors of all blocks end to end.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Sizes = tuple[int, ...]


def block_sigma(matrix: Tensor, u: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Return ``sigma = v^T W u`` of each row block; differentiable in the matrix, the vectors being constants.

    Args:
        matrix: shape (rows, columns).
        u: right singular vectors, shape (blocks, columns).
        v: left singular vectors, shape (rows,).
        sizes: rows of each block; they add up to ``rows``.

    Returns:
        Shape (blocks,), in the precision of the vectors.
    """
    with full_precision(matrix):
        matrix = matrix.to(u.dtype)
        if len(sizes) == 1:
            # Written as products of matrices, which sharded tensors know how to split.
            return (v.unsqueeze(0) @ (matrix @ u.t())).reshape(1)
        blocks = zip(matrix.split(sizes), u.unbind(), v.split(sizes), strict=True)
        return torch.stack([v_block @ (block @ u_block) for block, u_block, v_block in blocks])


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves operations on this tensor's device alone."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def per_row(values: Tensor, sizes: Sizes) -> Tensor:
    """Repeat one value per block, shape (blocks,), to one per row, shape (rows,); one block stays (1,)."""
    if len(sizes) == 1:
        return values
    return torch.cat([value.expand(size) for value, size in zip(values.split(1), sizes, strict=True)])


def power_iteration(matrix: Tensor, u: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """One power iteration per block: ``v = W u / |W u|``, then ``u = W^T v / |W^T v|``.

    Args:
        matrix: shape (rows, columns).
        u: right vectors, shape (blocks, columns).
        sizes: rows of each block.

    Returns:
        The unnormalised products ``(W^T W u, W u)`` of shapes (blocks, columns) and (rows,), to be written with
        `store_vectors_`.
    """
    if len(sizes) == 1:
        matrix = matrix.to(u.dtype)
        product = matrix @ u[0]
        return (product @ matrix).unsqueeze(0), product
    blocks = list(zip(matrix.to(u.dtype).split(sizes), u, strict=True))
    left = [block @ u_block for block, u_block in blocks]
    right = [z @ block for (block, _), z in zip(blocks, left, strict=True)]
    return torch.stack(right), torch.cat(left)


def store_vectors_(u: Tensor, v: Tensor, right: Tensor, left: Tensor, sizes: Sizes) -> None:
    """Normalise the products of a power iteration and write them into u and v.

    A product that is zero or not finite says nothing about direction: that block then keeps its old vectors, so one
    bad step does not poison the rest of a run.
    """
    v_parts, left_parts = ((v,), (left,)) if len(sizes) == 1 else (v.split(sizes), left.split(sizes))
    for u_block, v_block, right_block, left_block in zip(u, v_parts, right, left_parts, strict=True):
        right_norm, left_norm = right_block.norm(), left_block.norm()
        product = right_norm * left_norm
        usable = (product > 0) & (product < torch.inf)  # neither holds for NaN
        u_block.copy_(torch.where(usable, right_block / right_norm, u_block))
        v_block.copy_(torch.where(usable, left_block / left_norm, v_block))
