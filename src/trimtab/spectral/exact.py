"""The largest singular value of one matrix, to the accuracy of its dtype: SVD when small, Lanczos when large."""

import torch
from torch import Tensor

# Up to this shorter side a full SVD is the fastest exact answer on CPU and GPU alike; beyond it Lanczos wins by far.
_SVD_MAX_SIDE = 128
# Basis vectors kept before Lanczos starts afresh from its best estimate: bounds memory at 256 (rows + columns).
_MAX_BASIS = 256
_MAX_RESTARTS = 40


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
    if matrix.ndim != 2 or matrix.numel() == 0 or not matrix.is_floating_point():
        raise ValueError(
            f"expected a floating matrix of shape (rows, columns), got {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        work = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        if not bool(torch.isfinite(work).all()):
            raise ValueError("expected a finite matrix, got NaN or inf entries: look at them before taking its norm")
        # Scaled to entries of order one, so that squares neither overflow nor vanish.
        scale = work.abs().max()
        if not bool(scale > 0):
            return scale, _first_axis(work[0]), _first_axis(work[:, 0])
        if min(work.shape) <= _SVD_MAX_SIDE:
            left, values, right = torch.linalg.svd(work / scale, full_matrices=False)
            return values[0] * scale, right[0].clone(), left[:, 0].clone()
        sigma, u, v = _lanczos(work, scale, _starting_vector(work, start))
        return sigma * scale, u, v


def _first_axis(like: Tensor) -> Tensor:
    axis = torch.zeros_like(like)
    axis[0] = 1
    return axis


def _starting_vector(matrix: Tensor, start: Tensor | None) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)  # our own: the user's random state stays as it was
    noise = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype, device="cpu").to(matrix.device)
    noise = noise / noise.norm()
    if start is None:
        return noise
    # A little noise keeps an old vector that happens to be another singular vector from hiding the largest one.
    mixed = start.to(noise) / start.to(noise).norm() + 0.01 * noise
    return mixed / mixed.norm()


def _lanczos(matrix: Tensor, scale: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Golub-Kahan-Lanczos bidiagonalisation of ``matrix / scale``, fully reorthogonalised, restarted when too long.

    Golub and Van Loan, Matrix Computations (4th ed.), section 10.4. With ``W U = V B`` for an upper bidiagonal B, the
    residual of the leading singular triplet of B is ``|beta_k p_k|``; the error of sigma is quadratic in it.
    """
    eps = torch.finfo(matrix.dtype).eps
    # The error of sigma is about residual² / gap: a residual of 4e-6 (float32) leaves far less than 1e-6 of sigma
    # at the edge of a Gaussian spectrum, where neighbouring singular values are a thousandth apart.
    tolerance = 4e-6 if matrix.dtype == torch.float32 else 1e-11
    size = min(_MAX_BASIS, *matrix.shape)
    sigma, v = matrix.new_zeros(()), matrix.new_zeros(matrix.shape[0])
    for _ in range(_MAX_RESTARTS):
        U, V = matrix.new_zeros(size, matrix.shape[1]), matrix.new_zeros(size, matrix.shape[0])
        B = torch.zeros(size, size + 1, dtype=torch.float64, device="cpu")
        for k in range(size):
            U[k] = u
            left = _orthogonalise(matrix @ u / scale, V[:k])
            alpha, beta = float(left.norm()), 0.0
            # Below rounding, the basis already spans everything the matrix maps: its row of V and of B stays zero.
            if alpha > eps * float(B.max()):
                B[k, k] = alpha
                V[k] = left / alpha
                u = _orthogonalise(V[k] @ matrix / scale, U[: k + 1])
                beta = float(u.norm())
            B[k, k + 1] = beta
            exhausted = beta <= eps * float(B.max())
            if exhausted or k % 4 == 3 or k == size - 1:
                P, values, Q = torch.linalg.svd(B[: k + 1, : k + 1])
                sigma = values[0].to(matrix)
                best_u, best_v = Q[0].to(U) @ U[: k + 1], P[:, 0].to(V) @ V[: k + 1]
                if exhausted or beta * abs(float(P[k, 0])) <= tolerance * float(values[0]):
                    return sigma, best_u / best_u.norm(), best_v / best_v.norm()
            u = u / beta
        u, v = best_u / best_u.norm(), best_v / best_v.norm()
    return sigma, u, v


def _orthogonalise(vector: Tensor, basis: Tensor) -> Tensor:
    """Remove the components along the rows of an orthonormal basis; twice, because once is not enough in floats."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector
