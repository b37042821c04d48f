import math

import pytest
import torch

from trimtab.watch.signals import activations
from trimtab.watch.signals.activations import mean_square, mean_square_log_z


def test_mean_square_is_that_of_float64() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 300) * 3
    for own, tolerance in ((x, 1e-6), (x.bfloat16(), 1e-6), (x.double(), 1e-12)):
        assert mean_square(own).item() == pytest.approx(own.double().square().mean().item(), rel=tolerance)
    assert not mean_square(x.requires_grad_()).requires_grad


def test_log_z_by_hand() -> None:
    """Equal logits a over n classes have log Z = a + log n."""
    logits = torch.tensor([[2.0, 2.0, 2.0], [-5.0, -5.0, -5.0]])
    expected = ((2 + math.log(3)) ** 2 + (-5 + math.log(3)) ** 2) / 2
    assert mean_square_log_z(logits).item() == pytest.approx(expected)
    assert mean_square_log_z(torch.full((4, 2), 1e4)).item() == pytest.approx((1e4 + math.log(2)) ** 2)


def test_log_z_of_many_rows_is_taken_in_parts(monkeypatch) -> None:
    logits = torch.randn(4, 9, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = logits.double().exp().sum(-1).log().square().mean().item()
    monkeypatch.setattr(activations, "_AT_ONCE", 50)  # four rows at a time
    assert mean_square_log_z(logits).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("measure", [mean_square, mean_square_log_z])
@pytest.mark.parametrize("bad", [torch.tensor(1.0), torch.zeros(0, 3), torch.zeros(2, 3, dtype=torch.long)], ids=str)
def test_what_has_no_numbers_is_refused(measure, bad) -> None:
    with pytest.raises(ValueError, match="floating tensor with entries"):
        measure(bad)
