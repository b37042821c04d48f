import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.spectral.norms import norms
from trimtab.watch.signals.gradients import gradient_moments, gradient_norm


@settings(deadline=None, max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]),
    exponent=st.integers(-30, 30),
)
def test_norms_are_those_of_float64(shapes, dtype, exponent) -> None:
    torch.manual_seed(0)
    tensors = [(torch.randn(shape) * 10.0**exponent).to(dtype) for shape in shapes]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = [torch.linalg.vector_norm(tensor.to(wide)).item() for tensor in tensors]
    assert norms(tensors).tolist() == pytest.approx(expected, rel=1e-6)


def test_norms_of_large_tensors_lose_no_digits() -> None:
    """torch's own float32 norm of this tensor is off by 4e-6 and more; rows of a thousand are not."""
    torch.manual_seed(0)
    large = torch.randn(1025, 1023)
    half = large.bfloat16()
    expected = [torch.linalg.vector_norm(each.double()).item() for each in (large, large.t(), half)]
    assert norms([large, large.t(), half]).tolist() == pytest.approx(expected, rel=3e-7)


def test_norms_tell_broken_tensors_from_large_ones() -> None:
    fine, broken, infinite = torch.full((2,), 3e38), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])
    large, nan, inf = norms([fine, broken, infinite]).tolist()
    assert large == pytest.approx(3e38 * math.sqrt(2))
    assert math.isnan(nan)
    assert inf == math.inf
    assert norms([]).shape == (0,)


def norm_of_gradients(parameters) -> float | None:
    return gradient_norm(gradient_moments({str(i): parameter for i, parameter in enumerate(parameters)}))


def test_gradient_norm() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(1))]
    assert norm_of_gradients(parameters) is None
    parameters[0].grad = torch.tensor([3e30, 0.0])  # squares that float32 cannot hold
    parameters[1].grad = torch.zeros(3, 2)
    parameters[1].grad[2, 1] = 4e30
    assert norm_of_gradients(parameters) == pytest.approx(5e30, rel=1e-6)
    parameters[2].grad = torch.tensor([math.nan])
    assert math.isnan(norm_of_gradients(parameters))


def test_gradient_norm_of_sparse_and_half_gradients() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([3, 3, 7])).sum().backward()  # row 3 twice: its gradient is 2
    assert norm_of_gradients(embedding.parameters()) == pytest.approx(math.sqrt(4 * 4 + 4))
    half = nn.Parameter(torch.zeros(100, dtype=torch.bfloat16))
    half.grad = torch.ones(100, dtype=torch.bfloat16)
    assert norm_of_gradients([half]) == pytest.approx(10)
