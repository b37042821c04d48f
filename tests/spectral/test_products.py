"""Thin products in panels and in pieces equal the plain product."""

import pytest
import torch

from trimtab.spectral import products, thin_product


@pytest.mark.parametrize("shape", [(1, 37, 29), (3, 16, 40), (1, 2, 5), (2, 1, 7)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_panels(shape: tuple[int, int, int], transposed: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_PANEL_MIN_SIZE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    matrix = matrix.transpose(1, 2) if transposed else matrix
    vectors = torch.randn(shape[0], 4, matrix.shape[1], generator=generator, dtype=torch.float64)
    torch.testing.assert_close(thin_product(vectors, matrix), vectors @ matrix)


def test_half_precision_matrices_are_widened_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_WIDEN_SIZE", 10)
    matrix = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    vectors = torch.randn(1, 2, 7, generator=torch.Generator().manual_seed(1))
    product = thin_product(vectors, matrix)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, vectors @ matrix.float())
