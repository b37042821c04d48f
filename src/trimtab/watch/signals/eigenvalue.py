"""The largest eigenvalue of a symmetric operator known by its products."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Eigenvalue(NamedTuple):
    """An eigenvalue, the products it took, and its relative residual ``|H x - λ x| / |λ|``."""

    value: float
    iterations: int
    residual: float


Product = Callable[[Sequence[Tensor]], list[Tensor]]
"""Applies a symmetric operator to a vector that is a list of tensors."""


def largest_eigenvalue(
    product: Product, like: Sequence[Tensor], iterations: int, tolerance: float, seed: int
) -> Eigenvalue:
    """Lanczos for a symmetric operator on lists of tensors shaped like those given.

    The three-term recurrence keeps two vectors, not all of them: what orthogonality is lost makes copies of
    eigenvalues already found, and does the largest no harm (Paige 1980; Parlett, The Symmetric Eigenvalue Problem,
    chapter 13). The residual of the largest Ritz value is ``|beta_k s_k|``.

    Args:
        product: the operator.
        like: tensors of the shapes, dtypes and devices of its vectors.
        iterations: most products.
        tolerance: relative residual at which to end.
        seed: of the first vector.

    Returns:
        The largest eigenvalue, not the one of largest magnitude; NaN if a product is not finite.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    size = sum(p.numel() for p in like)
    now = [torch.randn(p.shape, generator=generator, device="cpu").to(p) for p in like]
    now = _times(now, 1 / _length(now))
    before, beta = [torch.zeros_like(p) for p in like], 0.0
    alphas: list[float] = []
    betas: list[float] = []
    found = Eigenvalue(float("nan"), 0, float("inf"))
    for k in range(1, min(iterations, size) + 1):
        image = product(now)
        alpha = _dot(now, image)
        rest = [w - alpha * v - beta * u for w, v, u in zip(image, now, before, strict=True)]
        beta = _length(rest)
        alphas.append(alpha)
        if not math.isfinite(alpha) or not math.isfinite(beta):
            return Eigenvalue(float("nan"), k, float("nan"))
        T = torch.diag(_numbers(alphas))
        if betas:
            T += torch.diag(_numbers(betas), 1) + torch.diag(_numbers(betas), -1)
        values, vectors = torch.linalg.eigh(T)
        value = values[-1].item()
        residual = beta * abs(vectors[-1, -1].item())
        found = Eigenvalue(value, k, residual / abs(value) if value else float(residual > 0))
        if residual <= tolerance * abs(value) or beta == 0:
            break
        betas.append(beta)
        before, now = now, _times(rest, 1 / beta)
    return found


def _dot(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    # Added up on the CPU after one wait: some devices have no float64.
    sums = [torch.dot(a.flatten(), b.flatten()).to(one[0].device) for a, b in zip(one, two, strict=True)]
    return torch.stack(sums).cpu().double().sum().item()


def _length(vectors: Sequence[Tensor]) -> float:
    return _dot(vectors, vectors) ** 0.5


def _numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _times(vectors: Sequence[Tensor], factor: float) -> list[Tensor]:
    return [vector * factor for vector in vectors]
