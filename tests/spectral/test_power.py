"""Sigma from carried vectors, and the iteration that moves them."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.spectral import block_sigma, per_row, power_iteration, store_vectors_


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), columns=st.integers(1, 6), seed=st.integers(0, 99))
def test_one_iteration_equals_numpy_block_by_block(sizes: list[int], columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, u = rng.normal(size=(sum(sizes), columns)), rng.normal(size=(len(sizes), columns))
    u_new, v_new = torch.tensor(u), torch.zeros(sum(sizes), dtype=torch.float64)
    right, left = power_iteration(torch.tensor(matrix), torch.tensor(u), tuple(sizes))
    store_vectors_(u_new, v_new, right, left, tuple(sizes))
    sigma = block_sigma(torch.tensor(matrix), u_new, v_new, tuple(sizes))
    row = 0
    for block, size in enumerate(sizes):
        part = matrix[row : row + size]
        v = part @ u[block]
        v /= np.linalg.norm(v)
        expected_u = part.T @ v
        expected_u /= np.linalg.norm(expected_u)
        np.testing.assert_allclose(v_new[row : row + size], v, atol=1e-12)
        np.testing.assert_allclose(u_new[block], expected_u, atol=1e-12)
        np.testing.assert_allclose(sigma[block], v @ part @ expected_u, rtol=1e-10)
        row += size


def test_a_broken_weight_leaves_the_vectors_as_they_were() -> None:
    for value in (0.0, float("nan"), float("inf")):
        u, v = torch.tensor([[0.6, 0.8]]), torch.tensor([1.0, 0.0, 0.0])
        right, left = power_iteration(torch.full((3, 2), value), u, (3,))
        store_vectors_(u, v, right, left, (3,))
        assert torch.equal(u, torch.tensor([[0.6, 0.8]]))
        assert torch.equal(v, torch.tensor([1.0, 0.0, 0.0]))


def test_values_per_block_spread_over_rows() -> None:
    assert per_row(torch.tensor([1.0, 2.0]), (1, 3)).tolist() == [1, 2, 2, 2]
    assert per_row(torch.tensor([5.0]), (4,)).tolist() == [5]
