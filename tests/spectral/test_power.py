"""Sigma from carried vectors."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.spectral import block_sigma, per_row, right_vector_of_each_row, sum_blocks


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), columns=st.integers(1, 6), seed=st.integers(0, 99))
def test_sigma_of_each_block_equals_numpy(sizes: list[int], columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, v = rng.normal(size=(sum(sizes), columns)), rng.normal(size=sum(sizes))
    u = rng.normal(size=(len(sizes), columns))
    sigma = block_sigma(torch.tensor(matrix), torch.tensor(u), torch.tensor(v), tuple(sizes))
    rows = right_vector_of_each_row(torch.tensor(u), tuple(sizes)).expand(sum(sizes), columns)
    first = 0
    for block, size in enumerate(sizes):
        own = slice(first, first + size)
        np.testing.assert_allclose(sigma[block], v[own] @ matrix[own] @ u[block], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(rows[own], np.tile(u[block], (size, 1)))
        first += size
    assert torch.autograd.gradcheck(
        lambda m: block_sigma(m, torch.tensor(u), torch.tensor(v), tuple(sizes)), torch.tensor(matrix).requires_grad_()
    )


def test_values_per_block_spread_over_rows_and_back() -> None:
    assert per_row(torch.tensor([1.0, 2.0]), (1, 3)).tolist() == [1, 2, 2, 2]
    assert per_row(torch.tensor([1.0, 2.0]), (2, 2)).tolist() == [1, 1, 2, 2]
    assert per_row(torch.tensor([5.0]), (4,)).tolist() == [5]
    assert sum_blocks(torch.tensor([1.0, 2, 3, 4]), (1, 3)).tolist() == [1, 9]
    assert sum_blocks(torch.tensor([1.0, 2, 3, 4]), (2, 2)).tolist() == [3, 7]
    assert sum_blocks(torch.tensor([1.0, 2, 3, 4]), (4,)).tolist() == [10]
