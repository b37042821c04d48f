"""The exact start of sigma."""

import pytest
import torch

from trimtab.spectral import spectral_norm

SHAPES = [(1, 7), (7, 1), (1, 1), (3, 5), (128, 128), (129, 129), (150, 2000), (2000, 150), (1024, 1024), (4096, 1024)]


def gaussian(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def largest_by_gram(matrix: torch.Tensor) -> torch.Tensor:
    """Independent oracle: the root of the largest eigenvalue of the smaller Gram matrix, in float64."""
    m = matrix.double()
    gram = m @ m.t() if m.shape[0] < m.shape[1] else m.t() @ m
    return torch.linalg.eigvalsh(gram)[-1].sqrt()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_gaussian_matrices_to_float_precision(shape: tuple[int, int]) -> None:
    matrix = gaussian(shape)
    expected = torch.linalg.matrix_norm(matrix.double(), 2) if min(shape) <= 200 else largest_by_gram(matrix)
    sigma, u, v = spectral_norm(matrix)
    assert abs(sigma / expected - 1) < 1e-6
    # The vectors carry the same value: v^T W u is what the forward divides by.
    assert abs(v @ matrix @ u / expected - 1) < 2e-6
    assert u.shape == (shape[1],)
    assert v.shape == (shape[0],)
    torch.testing.assert_close(u.norm(), torch.tensor(1.0))
    torch.testing.assert_close(v.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(4, 6), (300, 2000), (4096, 1024)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30], ids=lambda s: f"{s:g}")
def test_rank_one_of_any_magnitude(shape: tuple[int, int], size: float) -> None:
    column, row = gaussian((shape[0], 1)), gaussian((1, shape[1]))
    sigma, _, _ = spectral_norm(column @ row * size)
    assert abs(sigma.double() / (column.norm().double() * row.norm().double() * size) - 1) < 1e-5


def test_equal_singular_values() -> None:
    orthogonal = torch.linalg.qr(gaussian((300, 300)))[0] * 3
    sigma, u, v = spectral_norm(orthogonal)
    torch.testing.assert_close(sigma, torch.tensor(3.0))
    torch.testing.assert_close(v @ orthogonal @ u, torch.tensor(3.0))


def test_few_distinct_values_end_the_basis_early() -> None:
    matrix = torch.zeros(300, 400)
    matrix[5, 7], matrix[8, 9] = 2.0, -5.0
    sigma, u, v = spectral_norm(matrix)
    torch.testing.assert_close(sigma, torch.tensor(5.0))
    torch.testing.assert_close(u.abs().argmax(), torch.tensor(9))
    torch.testing.assert_close(v @ matrix @ u, torch.tensor(5.0))


def test_float64_is_kept() -> None:
    matrix = gaussian((200, 300), torch.float64)
    sigma, u, _ = spectral_norm(matrix)
    assert sigma.dtype == u.dtype == torch.float64
    assert abs(sigma / torch.linalg.matrix_norm(matrix, 2) - 1) < 1e-12


def test_half_precision_is_computed_in_float32() -> None:
    matrix = gaussian((40, 30)).bfloat16()
    sigma, _, _ = spectral_norm(matrix)
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(matrix.float(), 2))


def test_a_start_that_is_another_singular_vector_does_not_mislead() -> None:
    matrix = torch.diag(torch.linspace(1, 2, 300))
    wrong = torch.zeros(300)
    wrong[0] = 1
    sigma, _, _ = spectral_norm(matrix, start=wrong)
    torch.testing.assert_close(sigma, torch.tensor(2.0))


def test_nothing_is_drawn_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    spectral_norm(gaussian((200, 300)))
    assert torch.equal(state, torch.get_rng_state())


def test_a_zero_matrix_has_norm_zero() -> None:
    sigma, u, v = spectral_norm(torch.zeros(200, 300))
    assert sigma == 0
    assert u.norm() == v.norm() == 1


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(2, 2, 2), "shape"),
        (torch.zeros(0, 4), "shape"),
        (torch.zeros(2, 2, dtype=torch.int64), "floating"),
        (torch.tensor([[1.0, float("nan")]]), "NaN"),
        (torch.tensor([[1.0, float("inf")]]), "inf"),
    ],
)
def test_bad_matrices_are_refused(matrix: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectral_norm(matrix)
