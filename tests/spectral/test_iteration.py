"""One block iteration against numpy: power iteration for one vector, Rayleigh-Ritz by SVD for several."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.spectral import block_iteration


def move(matrices: list[Tensor], bases: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return block_iteration(
        bases,
        lambda vectors: [x @ m.transpose(1, 2) for x, m in zip(vectors, matrices, strict=True)],
        lambda vectors: [x @ m for x, m in zip(vectors, matrices, strict=True)],
    )


def rotated(vectors: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(columns, vectors)))[0].T


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    vectors=st.integers(1, 4),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_the_best_pair_within_the_span(rows: int, columns: int, vectors: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = min(vectors, rows, columns)
    matrix, basis = scale * rng.normal(size=(rows, columns)), rotated(vectors, columns, rng)
    [(moved, v)] = move([torch.tensor(matrix)[None]], [torch.tensor(basis)[None]])
    span = np.linalg.qr(matrix @ basis.T)[0]
    best = np.linalg.svd(span.T @ matrix, compute_uv=False)[0]  # max |W^T v| over unit v in span(W U)
    sigma = v[0].numpy() @ matrix @ moved[0, 0].numpy()
    np.testing.assert_allclose(sigma, best, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(v[0]), 1, rtol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(moved[0], axis=1), 1, rtol=1e-10)
    projector = span.T @ matrix  # the new basis spans the rows of it
    kept = moved[0].numpy() @ np.linalg.pinv(projector) @ projector
    np.testing.assert_allclose(kept, moved[0].numpy(), atol=1e-6)


def test_one_vector_is_the_published_power_iteration() -> None:
    rng = np.random.default_rng(0)
    matrix, u = rng.normal(size=(5, 3)), rotated(1, 3, rng)
    [(moved, left)] = move([torch.tensor(matrix)[None]], [torch.tensor(u)[None]])
    v = matrix @ u[0]
    v /= np.linalg.norm(v)
    expected = matrix.T @ v
    np.testing.assert_allclose(left[0], v, atol=1e-14)
    np.testing.assert_allclose(moved[0, 0], expected / np.linalg.norm(expected), atol=1e-14)


def test_it_converges_to_the_leading_singular_vectors_in_order() -> None:
    rng = np.random.default_rng(0)
    left, right = rotated(6, 8, rng), rotated(6, 10, rng)
    matrix = left.T @ np.diag([5.0, 4.0, 3.0, 2.0, 0.1, 0.05]) @ right
    basis = torch.tensor(rotated(4, 10, rng))[None]
    for _ in range(60):
        [(basis, v)] = move([torch.tensor(matrix)[None]], [basis])
    np.testing.assert_allclose(np.abs(basis[0].numpy() @ right.T)[:, :4], np.eye(4), atol=1e-8)
    np.testing.assert_allclose(abs(v[0].numpy() @ left[0]), 1, atol=1e-12)


def test_a_direction_that_overtakes_the_leading_one_is_found_at_once() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    basis = torch.eye(3)[None, :2]
    matrix[0, 1, 1] = 9.0
    [(basis, v)] = move([matrix], [basis])
    assert float(v[0] @ matrix[0] @ basis[0, 0]) == pytest.approx(9.0)


def test_matrices_of_all_shapes_and_ranks_move_together_as_they_do_alone() -> None:
    rng = np.random.default_rng(0)
    matrices = [torch.tensor(rng.normal(size=shape)) for shape in ((2, 5, 4), (1, 3, 7), (3, 6, 6))]
    matrices.append(torch.tensor(np.outer(rng.normal(size=4), rng.normal(size=5)))[None])  # rank one
    bases = [torch.tensor(np.stack([rotated(3, m.shape[2], rng) for _ in m])) for m in matrices]
    together = move(matrices, bases)
    for matrix, basis, (moved, v) in zip(matrices, bases, together, strict=True):
        for i in range(len(matrix)):
            [(alone, alone_v)] = move([matrix[i : i + 1]], [basis[i : i + 1]])
            torch.testing.assert_close((moved[i], v[i]), (alone[0], alone_v[0]))
    rank_one, (moved, v) = matrices[-1][0], together[-1]
    torch.testing.assert_close(v[0] @ rank_one @ moved[0, 0], torch.linalg.matrix_norm(rank_one, 2))
    assert moved.isfinite().all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("vectors", [1, 3])
def test_a_broken_weight_keeps_its_vectors_and_spoils_no_other(value: float, vectors: int) -> None:
    rng = np.random.default_rng(0)
    basis = torch.tensor(np.stack([rotated(vectors, 4, rng)] * 2))
    matrix = torch.tensor(rng.normal(size=(2, 5, 4)))
    matrix[0] = value
    [(moved, v)] = move([matrix], [basis])
    assert torch.equal(moved[0], basis[0])
    assert v[0].isnan().all()  # the caller keeps what it has
    sound = torch.linalg.matrix_norm(matrix[1], 2)
    assert 0.5 * sound < float(v[1] @ matrix[1] @ moved[1, 0]) <= sound * (1 + 1e-12)
