"""The leading singular vectors of one matrix, to the accuracy of its dtype: SVD when small, Lanczos when large."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.spectral.precision import exact_products
from trimtab.spectral.products import thin_product

# Up to this shorter side a full SVD is the fastest exact answer on CPU and GPU alike; beyond it Lanczos wins by far.
_SVD_MAX_SIDE = 128
# Basis vectors kept before Lanczos starts afresh from its best estimate: bounds memory at 256 (rows + columns).
_MAX_BASIS = 256
_MAX_RESTARTS = 40
# A half-precision matrix of up to so many entries is copied in float32, 256 MB; a larger one is widened in parts.
_WIDEN_AT_ONCE = 2**26


class Leading(NamedTuple):
    """The largest singular value of a matrix with its vectors, and the directions next in line.

    Attributes:
        sigma: shape ().
        basis: orthonormal rows, shape (k, columns): the right singular vector of sigma first, then those of the next
            singular values, exact after an SVD, else as good as Lanczos found them on its way to the first.
        v: left singular vector of sigma, shape (rows,).
    """

    sigma: Tensor
    basis: Tensor
    v: Tensor


class Operator(NamedTuple):
    """A matrix known by what it does to a vector, so that it may lie in pieces on several processes.

    Attributes:
        shape: rows, columns.
        like: a tensor of the dtype and device of the computation.
        to_rows: maps u (columns,) to W u.
        to_columns: maps v (rows,) to W^T v.
        agree: turns one process's yes or no into that of all.
        tolerance: bound on the relative error of sigma.
    """

    shape: tuple[int, int]
    like: Tensor
    to_rows: Callable[[Tensor], Tensor]
    to_columns: Callable[[Tensor], Tensor]
    agree: Callable[[bool], bool]
    tolerance: float


def spectral_norm(matrix: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular value of a matrix and its two singular vectors.

    Nothing is drawn from torch's global random state, and the same matrix gives the same answer every time.

    Args:
        matrix: shape (rows, columns), any floating dtype, finite. Half-precision input is computed in float32.
        start: shape (columns,), a guess of the right singular vector (for instance that of the matrix a few
            optimiser steps earlier), which makes Lanczos converge in fewer steps. It need not have unit length.

    Returns:
        ``(sigma, u, v)``: sigma of shape (), u of shape (columns,) and v of shape (rows,), both of unit length, such
        that ``matrix @ u = sigma v``. float64 for float64 input, else float32. A zero matrix gives sigma 0.

    Raises:
        ValueError: if the matrix is not two-dimensional, is empty, not floating, or holds NaN or inf.
    """
    found = leading(matrix, 1, start)
    return found.sigma, found.basis[0], found.v


def leading(matrix: Tensor, count: int, start: Tensor | None = None) -> Leading:
    """Return the largest singular value with its vectors, and ``count`` right vectors in all.

    Args:
        matrix: as for `spectral_norm`.
        count: k, at most the shorter side of the matrix.
        start: as for `spectral_norm`.

    Raises:
        ValueError: as `spectral_norm`.
    """
    if matrix.ndim != 2 or matrix.numel() == 0 or not matrix.is_floating_point():
        raise ValueError(
            f"expected a floating matrix of shape (rows, columns), got {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    with torch.no_grad(), exact_products(matrix.device.type):
        matrix = matrix.detach()
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        scale, tolerance = largest_entry(matrix).to(dtype), tolerance_of(matrix.dtype)
        check_finite(scale)
        if not bool(scale > 0):
            axes = torch.eye(max(matrix.shape), dtype=dtype, device=matrix.device)
            return Leading(scale, axes[:count, : matrix.shape[1]].clone(), axes[0, : matrix.shape[0]].clone())
        if min(matrix.shape) <= _SVD_MAX_SIDE:
            # Scaled to entries of order one, so that squares neither overflow nor vanish.
            left, values, right = torch.linalg.svd(matrix.to(dtype) / scale, full_matrices=False)
            return Leading(values[0] * scale, right[:count].clone(), left[:, 0].clone())
        if matrix.numel() <= _WIDEN_AT_ONCE:  # read some hundred times: widening it once is worth a copy
            matrix = matrix.to(dtype)
        operator = Operator(
            (matrix.shape[0], matrix.shape[1]),
            matrix.new_empty(0, dtype=dtype),
            lambda u: thin_product(u.view(1, 1, -1), matrix.t().unsqueeze(0)).view(-1) / scale,
            lambda v: thin_product(v.view(1, 1, -1), matrix.unsqueeze(0)).view(-1) / scale,
            lambda decision: decision,
            tolerance,
        )
        found = lanczos(operator, count, start)
        return found._replace(sigma=found.sigma * scale)


def largest_entry(matrix: Tensor) -> Tensor:
    """Return the largest magnitude in a matrix, NaN if it holds one; no copy of the matrix is made."""
    low, high = torch.aminmax(matrix)
    return torch.maximum(low.abs(), high.abs())


def check_finite(largest: Tensor) -> None:
    """Raise the ValueError for a matrix whose largest entry is NaN or inf."""
    if not bool(torch.isfinite(largest)):
        raise ValueError("expected a finite matrix, got NaN or inf entries: look at them before taking its norm")


def _starting_vector(operator: Operator, start: Tensor | None) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)  # our own: the user's random state stays as it was
    like = operator.like
    noise = torch.randn(operator.shape[1], generator=generator, dtype=like.dtype, device="cpu").to(like.device)
    noise = noise / noise.norm()
    if start is None:
        return noise
    # A little noise keeps an old vector that happens to be another singular vector from hiding the largest one.
    mixed = start.to(noise) / start.to(noise).norm() + 0.01 * noise
    return mixed / mixed.norm()


def lanczos(operator: Operator, count: int, start: Tensor | None = None) -> Leading:
    """Golub-Kahan-Lanczos bidiagonalisation, fully reorthogonalised, restarted when too long.

    Golub and Van Loan, Matrix Computations (4th ed.), section 10.4. With ``W U = V B`` for an upper bidiagonal B, the
    residual of the leading singular triplet of B is ``|beta_k p_k|``; the error of sigma is at most that residual, and
    at most its square over the gap to the next singular value.
    """
    (rows, columns), like = operator.shape, operator.like
    eps = torch.finfo(like.dtype).eps
    size = min(_MAX_BASIS, rows, columns)
    u = _starting_vector(operator, start)
    for _ in range(_MAX_RESTARTS):
        U, V = like.new_zeros(size + 1, columns), like.new_zeros(size, rows)
        U[0] = u
        B = torch.zeros(size, size + 1, dtype=torch.float64, device="cpu")
        for k in range(size):
            left = _orthogonalise(operator.to_rows(U[k]), V[:k])
            alpha, beta = float(left.norm()), 0.0
            # Below rounding, the basis already spans everything the matrix maps: its row of V and of B stays zero.
            if alpha > eps * float(B.max()):
                B[k, k] = alpha
                V[k] = left / alpha
                u = _orthogonalise(operator.to_columns(V[k]), U[: k + 1])
                beta = float(u.norm())
            B[k, k + 1] = beta
            exhausted = operator.agree(beta <= eps * float(B.max()))
            if not exhausted:
                U[k + 1] = u / beta
            # Once V spans all rows, W = V B U^T holds exactly, with one more right vector than left ones.
            complete = exhausted or k + 1 == rows
            if complete or k % 4 == 3 or k == size - 1:
                width = k + 2 if complete and not exhausted else k + 1
                P, values, Q = torch.linalg.svd(B[: k + 1, :width], full_matrices=False)
                residual = beta * abs(float(P[k, 0]))
                gap = float(values[0] - values[1]) if k else float(values[0])
                error = residual * min(1.0, residual / (max(gap, residual) or 1.0))
                converged = error <= operator.tolerance * float(values[0])
                if complete or operator.agree(converged and k + 1 >= count) or k == size - 1:
                    basis = orthonormal_rows(Q[:count].to(U) @ U[:width], count)
                    v = P[:, 0].to(V) @ V[: k + 1]
                    found = Leading(values[0].to(like), basis, v / v.norm())
                    if complete or operator.agree(converged):
                        return found
        u = found.basis[0]
    return found


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the bound on the relative error of sigma at which Lanczos stops for a matrix of this dtype.

    The bound is a cautious one: on Gaussian matrices the error itself lies far below it, in rounding.
    """
    return 1e-15 if dtype == torch.float64 else 1e-6


def orthonormal_rows(vectors: Tensor, count: int) -> Tensor:
    """Return ``count`` orthonormal rows, the first of which span those given; the rest are drawn from a fixed seed."""
    generator = torch.Generator("cpu").manual_seed(1)
    more = torch.randn(count - len(vectors), vectors.shape[1], generator=generator, dtype=vectors.dtype, device="cpu")
    rows: list[Tensor] = []
    for vector in torch.cat([vectors, more.to(vectors.device)]):
        rest = _orthogonalise(vector, torch.stack(rows)) if rows else vector
        rows.append(rest / rest.norm())
    return torch.stack(rows)


def _orthogonalise(vector: Tensor, basis: Tensor) -> Tensor:
    """Remove the components along the rows of an orthonormal basis; twice, because once is not enough in floats."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector
