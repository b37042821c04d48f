import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.attention import attention_stats_reference, entropy_lower_bound


@pytest.mark.parametrize(
    ("num_keys", "logit_norm", "nats"),
    [(128, 1, 4.8443), (128, 5, 2.8995), (128, 10, 0.0609), (16, 1, 2.7168), (16, 5, 0.4903), (16, 10, 0.0056)],
)
def test_published_formula(num_keys: int, logit_norm: float, nats: float) -> None:
    assert entropy_lower_bound(logit_norm, num_keys).item() == pytest.approx(nats, abs=5e-5)  # 4 decimals printed


def entropy_and_norm(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Measured entropy (nats) and centred norm of each row of float64 logits (rows, keys)."""
    measured = attention_stats_reference(logits, torch.eye(logits.shape[-1]), scale=1.0).entropy
    return measured, (logits - logits.mean(-1, keepdim=True)).norm(dim=-1)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40))
def test_measured_entropy_is_never_below(row: list[float]) -> None:
    entropy, norm = entropy_and_norm(torch.tensor([row], dtype=torch.float64))
    # float64 entropies of up to 40 terms are good to about 1e-14; logits of 50 carry 50 eps = 1e-14 of their own.
    assert entropy >= entropy_lower_bound(norm, len(row)) - 1e-12


@pytest.mark.parametrize("num_keys", [2, 3, 16, 500])
@pytest.mark.parametrize("gap", [0.0, 0.3, 5.0, 30.0])
def test_touched_when_one_logit_stands_above_equal_ones(num_keys: int, gap: float) -> None:
    row = torch.zeros(1, num_keys, dtype=torch.float64)
    row[0, 0] = gap
    entropy, norm = entropy_and_norm(row)
    assert entropy_lower_bound(norm, num_keys).item() == pytest.approx(entropy.item(), rel=1e-12, abs=1e-14)


def test_ends_of_the_range() -> None:
    assert entropy_lower_bound(0.0, 7).item() == pytest.approx(math.log(7))
    for norm in (1e3, 1e30, 1e308, math.inf):
        assert entropy_lower_bound(norm, 7).item() == pytest.approx(0, abs=1e-300)
        assert entropy_lower_bound(norm, 1).item() == 0
    assert entropy_lower_bound(0.0, 1).item() == 0
    assert entropy_lower_bound(math.nan, 7).isnan()


def test_tensors_broadcast_and_keep_at_least_float32() -> None:
    norm = torch.tensor([[1.0], [5.0]])
    bound = entropy_lower_bound(norm, torch.tensor([16, 128]))
    assert bound.shape == (2, 2)
    assert bound.dtype == torch.float32
    expected = torch.tensor([[2.7168, 4.8443], [0.4903, 2.8995]])
    assert torch.allclose(bound, expected, atol=1e-4)
    assert entropy_lower_bound(norm.bfloat16(), 16).dtype == torch.float32
    assert entropy_lower_bound(norm.double(), 16).dtype == torch.float64
    assert entropy_lower_bound(1.0, 16).dtype == torch.float64
    assert not entropy_lower_bound(norm.requires_grad_(), 16).requires_grad


@pytest.mark.parametrize(
    ("logit_norm", "num_keys", "error", "says"),
    [
        (-1.0, 4, ValueError, "logit_norm >= 0"),
        (torch.tensor([1.0, -2.0]), 4, ValueError, r"got -2\.0"),
        (1.0, 0, ValueError, "num_keys >= 1, got 0"),
        (1.0, torch.tensor([3, 0]), ValueError, "num_keys >= 1"),
        ("1", 4, TypeError, "logit_norm to be a number"),
        (1.0, None, TypeError, "num_keys to be a number"),
    ],
)
def test_refusals(logit_norm, num_keys, error, says) -> None:
    with pytest.raises(error, match=says):
        entropy_lower_bound(logit_norm, num_keys)


def test_numbers_do_not_go_to_the_default_device() -> None:
    with torch.device("meta"):
        assert entropy_lower_bound(5, 128).item() == entropy_lower_bound(5.0, torch.tensor(128, device="cpu")).item()
