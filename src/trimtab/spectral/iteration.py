"""The step that keeps singular vectors up to date with their weight: one block power iteration, Rayleigh-Ritz.

For k vectors U (as rows, nearly orthonormal) carried for a weight W, one step reads W twice:

    P = orthonormal rows of U W^T        Y = P W        A = Y Y^T

The largest eigenvalue of the k x k matrix A is the square of the largest ``|W^T v|`` over unit vectors v in the span of
P (Rayleigh-Ritz; Parlett, The Symmetric Eigenvalue Problem, chapter 11). P and Y are rotated so that their first rows
belong to it: the first row of P is the new v, the normalised rows of Y are the new U, its first row the new u, and
``v^T W u`` is that largest value. For k = 1 this is the published algorithm (Zhai et al., ICML 2023, arXiv 2303.06296):
``v = W u / |W u|``, then ``u = W^T v / |W^T v|``.

Nothing here waits for the device, and all weights of a model share the k x k work.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Products = Callable[[list[Tensor]], list[Tensor]]
"""Multiplies every weight with its vectors: for each a tensor (B, k, columns) in and (B, k, rows) out, or back."""


def block_iteration(bases: Sequence[Tensor], to_rows: Products, to_columns: Products) -> list[tuple[Tensor, Tensor]]:
    """Move the vectors carried for many weights by one step.

    A vector whose product is zero or not finite says nothing about direction: it is kept as it was, and without a
    usable first vector a block keeps its left vector too, so one bad step does not poison the rest of a run.

    Args:
        bases: for each stack of B matrices (rows, columns) the carried right vectors, shape (B, k, columns).
        to_rows: returns ``U W^T`` for each, shape (B, k, rows).
        to_columns: returns ``P W`` for each, shape (B, k, columns).

    Returns:
        For each ``(basis, v)``: the new right vectors, of shape (B, k, columns), and the left singular vectors
        of shape (B, rows), NaN where there is no usable one.
    """
    images = [_in_range(each) for each in to_rows(list(bases))]
    images = _apply(_together(_orthonormalizer, images), images)
    returned = [_in_range(each) for each in to_columns(images)]
    rotations = _together(_leading_first, returned)
    images, returned = _apply(rotations, images), _apply(rotations, returned)
    moved = []
    for basis, image, back in zip(bases, images, returned, strict=True):
        length = torch.linalg.vector_norm(back, dim=2, keepdim=True)
        usable = (length > 0) & (length < torch.inf)  # neither holds for NaN
        left = image[:, 0]
        v = left / torch.linalg.vector_norm(left, dim=1, keepdim=True)
        moved.append((torch.where(usable, back / length, basis), torch.where(usable[:, 0], v, torch.nan)))
    return moved


def _in_range(vectors: Tensor) -> Tensor:
    """Scale vectors (B, k, n) to entries of order one, so that squares neither overflow nor vanish.

    By a power of two for each of the B, which rounds nothing; zero and non-finite vectors become NaN.
    """
    largest = vectors.abs().amax((1, 2), keepdim=True)
    return vectors / largest.log2().floor().exp2()


def _together(make: Callable[[Tensor], Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """Return ``make(X X^T)``, shape (B, k, k), for each X of shape (B, k, n), all of one k in a single call."""
    grams = [torch.bmm(each, each.transpose(1, 2)) for each in vectors]
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, gram in enumerate(grams):
        groups.setdefault((gram.shape[1], gram.dtype, gram.device), []).append(i)
    for members in groups.values():
        made = make(torch.cat([grams[i] for i in members]))
        for i, own in zip(members, made.split([len(grams[i]) for i in members]), strict=True):
            grams[i] = own
    return grams


def _apply(mixes: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    return [torch.bmm(mix, each) for mix, each in zip(mixes, vectors, strict=True)]


def _orthonormalizer(gram: Tensor) -> Tensor:
    """Return C, lower triangular, with ``C G C^T = 1``: Gram-Schmidt on the rows whose inner products are G (n, k, k).

    A row that lies in the span of those before it, to the precision of G, becomes zero.
    """
    n, k, _ = gram.shape
    tolerance = 16 * torch.finfo(gram.dtype).eps
    unit = torch.eye(k, dtype=gram.dtype, device=gram.device)
    rows: list[Tensor] = []
    for i in range(k):
        row, rest = unit[i].expand(n, k), gram[:, i, i]
        if rows:
            before = torch.stack(rows, dim=1)
            overlap = torch.bmm(before, gram[:, :, i : i + 1])
            row = row - (overlap * before).sum(1)
            rest = rest - overlap.square().sum((1, 2))
        enough = rest > tolerance * gram[:, i, i]
        rows.append(row * torch.where(enough, rest.rsqrt(), 0).unsqueeze(1))
    return torch.stack(rows, dim=1)


def _leading_first(gram: Tensor) -> Tensor:
    """Return an orthogonal matrix whose first row is the leading eigenvector of G (n, k, k), symmetric, not negative.

    The eigenvector comes from squaring G until only its leading eigenvalue is left, the rest of the matrix from one
    Householder reflection. No eigensolver: those wait for the device, which CUDA graphs forbid.
    """
    unit = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    if len(unit) == 1:
        return unit.expand_as(gram)
    power = gram
    for i in range(12):
        if i % 3 == 0:  # squares of numbers from 1/k to 1 stay in range for three rounds
            power = power / power.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        power = torch.bmm(power, power)
    largest = power.diagonal(dim1=1, dim2=2).argmax(1)
    leading = power.gather(1, largest[:, None, None].expand(-1, 1, gram.shape[2])).squeeze(1)
    leading = leading / torch.linalg.vector_norm(leading, dim=1, keepdim=True)
    sign = torch.where(leading[:, :1] < 0, -1.0, 1.0).to(gram.dtype)
    normal = leading + sign * unit[0]  # |normal|² = 2 + 2 |first entry|, never small
    reflection = unit - normal.unsqueeze(2) * normal.unsqueeze(1) * (2 / normal.square().sum(1))[:, None, None]
    return torch.cat([-sign.unsqueeze(1) * reflection[:, :1], reflection[:, 1:]], dim=1)
