"""Numbers of one weight, and of a pair of them, computed without a second copy of either."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.spectral import exact_products, spectral_norm
from trimtab.spectral.exact import Operator, lanczos, tolerance_of
from trimtab.watch.signals.spectra import qk_energy

# Entries that are widened to float64 at once: 2 MB.
_AT_ONCE = 2**18
# A matrix with a side this short is reduced to its Gram matrix if it is large: an SVD would hold it several times.
_SHORT = 128
_LARGE = 2**20
# Of attention whose heads are unknown, W_q^T W_k of up to this side is decomposed in full.
_FULL = 1024


class Measures(NamedTuple):
    """Numbers of one matrix.

    Attributes:
        sigma: largest singular value; NaN if the matrix is not finite.
        stable_rank: squared Frobenius norm over squared sigma; NaN if the matrix is zero or not finite.
        frobenius: square root of the sum of squares.
        rms: square root of the mean square.
        max_abs: largest magnitude among the finite entries.
        nonfinite: entries that are NaN or infinite.
    """

    sigma: float
    stable_rank: float
    frobenius: float
    rms: float
    max_abs: float
    nonfinite: int


@torch.no_grad()
def measure(matrix: Tensor) -> Measures:
    """Measure a matrix.

    Args:
        matrix: (rows, columns), any floating dtype; 8-bit floats are widened to float32.
    """
    if matrix.element_size() == 1:
        matrix = matrix.float()
    square, max_abs, nonfinite = sums(matrix)
    sigma = math.nan if nonfinite else _sigma(matrix, max_abs)
    stable_rank = square / sigma**2 if sigma else math.nan
    return Measures(sigma, stable_rank, math.sqrt(square), math.sqrt(square / matrix.numel()), max_abs, nonfinite)


def sums(tensor: Tensor) -> tuple[float, float, int]:
    """Sum of squares (NaN or inf if it holds these), largest finite magnitude, and count of entries not finite."""
    square, max_abs, nonfinite = 0.0, 0.0, 0
    for piece in _pieces(tensor):
        square += float(torch.linalg.vector_norm(piece)) ** 2
        if not math.isfinite(square):
            finite = piece.isfinite()
            nonfinite += piece.numel() - int(finite.sum())
            piece = piece.where(finite, 0)
        low, high = piece.aminmax()
        max_abs = max(max_abs, -float(low), float(high))
    return square, max_abs, nonfinite


def _pieces(tensor: Tensor) -> "list[Tensor] | map[Tensor]":
    """The tensor in float64, some rows at a time."""
    rows = tensor.unsqueeze(0) if tensor.ndim < 2 else tensor
    step = max(1, _AT_ONCE // max(1, math.prod(rows.shape[1:])))
    return map(Tensor.double, rows.split(step))


def _sigma(matrix: Tensor, max_abs: float) -> float:
    if min(matrix.shape) > _SHORT or matrix.numel() <= _LARGE or not max_abs:
        return float(spectral_norm(matrix)[0])
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
    gram = tall.new_zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for piece in _pieces(tall):
        piece = piece / max_abs  # not in place: a float64 piece is the weight itself
        gram += piece.t() @ piece
    return math.sqrt(float(spectral_norm(gram)[0])) * max_abs


def qk_shares(query: Tensor, key: Tensor, num_heads: int, num_key_heads: int, top: int) -> list[float]:
    """Share of the energy of W_q^T W_k in its top singular values for each head, one key head at a time.

    Args:
        query: W_q, (num_heads · head_dim, width).
        key: W_k, (num_key_heads · head_dim, width); each of its heads serves neighbouring query heads.
        num_heads: of the queries.
        num_key_heads: of the keys; divides `num_heads`.
        top: how many singular values count as the top.

    Returns:
        What `qk_energy` says, a number for each query head.
    """
    queries = query.unflatten(0, (num_key_heads, num_heads // num_key_heads, -1))
    keys = key.unflatten(0, (num_key_heads, -1))
    return [
        share
        for query_heads, key_head in zip(queries, keys, strict=True)
        for share in qk_energy(query_heads, key_head.unsqueeze(0), top).tolist()
    ]


@torch.no_grad()
def qk_share_of_all_heads(query: Tensor, key: Tensor, top: int) -> float:
    """The share for all heads taken as one, where their number is unknown.

    W_q^T W_k is (width, width) and of full rank. A large one is never built: Lanczos finds its largest singular value,
    and its energy is summed a few columns at a time. That gives the top one alone.

    Args:
        query: W_q, (rows, width).
        key: W_k, (rows, width).
        top: how many singular values count as the top.

    Returns:
        The share; NaN where it cannot be told, also for top > 1 of a width above 1,024.
    """
    if min(query.shape) <= _FULL:
        return qk_energy(query.unsqueeze(0), key.unsqueeze(0), top).item()
    if top > 1 or not bool(query.isfinite().all() and key.isfinite().all()):
        return math.nan
    query, key = query.float(), key.float()
    product = Operator(
        (query.shape[1], key.shape[1]),
        query.new_empty(0),
        lambda u: query.t() @ (key @ u),
        lambda v: key.t() @ (query @ v),
        lambda decision: decision,
        tolerance_of(torch.float32),
    )
    step = max(1, _AT_ONCE // query.shape[1])
    with exact_products(query.device.type):
        total = sum(float((query.t() @ part).square().sum(dtype=torch.float64)) for part in key.split(step, 1))
        return float(lanczos(product, 1).sigma) ** 2 / total if total else math.nan
