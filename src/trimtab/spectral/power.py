"""Sigma of a weight from the singular vectors it carries.

A matrix may be cut into blocks of rows (query | key | value), each with a sigma of its own. ``sizes`` gives the rows of
each block; u holds one right vector per block, v the left vectors of all blocks end to end.
"""

import torch
from torch import Tensor

from trimtab.spectral.precision import without_autocast
from trimtab.spectral.products import thin_product

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
    with without_autocast(matrix):
        if hasattr(matrix, "device_mesh"):
            # Written as whole products, which sharded tensors know how to split.
            products = (matrix.to(u.dtype) @ u.t()) * v.unsqueeze(1)
            return replicated((products * membership(sizes, products)).sum(0))
        if is_even(sizes):
            blocks = matrix.unflatten(0, (len(sizes), sizes[0]))
            image = thin_product(u.unsqueeze(1), blocks.transpose(1, 2))
            return (image.squeeze(1) * v.view(len(sizes), -1)).sum(1)
        parts = zip(matrix.split(sizes), u.unbind(), v.split(sizes), strict=True)
        return torch.cat([block_sigma(block, right.unsqueeze(0), left, (len(left),)) for block, right, left in parts])


def is_even(sizes: Sizes) -> bool:
    """Say whether all blocks have the same number of rows, so that a matrix is a stack of them."""
    return sizes.count(sizes[0]) == len(sizes)


def per_row(values: Tensor, sizes: Sizes) -> Tensor:
    """Repeat one value per block, shape (blocks,), to one per row, shape (rows,); one block stays (1,)."""
    if len(sizes) == 1:
        return values
    if is_even(sizes):
        return values.unsqueeze(1).expand(len(sizes), sizes[0]).reshape(-1)
    return torch.cat([value.expand(size) for value, size in zip(values.split(1), sizes, strict=True)])


def sum_blocks(values: Tensor, sizes: Sizes) -> Tensor:
    """Sum one value per row, shape (rows,), to one per block, shape (blocks,)."""
    if len(sizes) == 1:
        return replicated(values.sum(0, keepdim=True))
    if hasattr(values, "device_mesh"):
        return replicated((values.unsqueeze(1) * membership(sizes, values)).sum(0))
    if is_even(sizes):
        return values.view(len(sizes), -1).sum(1)
    return torch.stack([part.sum() for part in values.split(sizes)])


def right_vector_of_each_row(u: Tensor, sizes: Sizes) -> Tensor:
    """Return, for every row, the right vector of its block: shape (rows, columns), or (1, columns) for one block."""
    return u if len(sizes) == 1 else membership(sizes, u) @ u


def membership(sizes: Sizes, like: Tensor) -> Tensor:
    """Return 1 where a row (first dimension) belongs to a block (second), else 0; a replica on the mesh of ``like``."""
    mask = torch.ones(sum(sizes), 1, dtype=like.dtype, device=like.device)
    if len(sizes) > 1:
        rows = torch.tensor(sizes, device=like.device)
        owners = torch.arange(len(sizes), device=like.device).repeat_interleave(rows, output_size=sum(sizes))
        mask = torch.nn.functional.one_hot(owners, len(sizes)).to(like.dtype)
    if not hasattr(like, "device_mesh"):
        return mask
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(mask, mesh, [Replicate()] * mesh.ndim, run_check=False)


def replicated(tensor: Tensor) -> Tensor:
    """Return a tensor whole on every process if it is sharded, or a sum still to be added up; others as they are."""
    if not hasattr(tensor, "device_mesh"):
        return tensor
    from torch.distributed.tensor import Replicate

    whole: Tensor = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)  # type: ignore[attr-defined]
    return whole
