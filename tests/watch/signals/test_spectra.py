import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.watch.signals.spectra import collapse_kind, qk_energy


def by_svd(query, key, top):
    """The definition: the whole d_model × d_model matrix of each head, in float64."""
    key = key.repeat_interleave(len(query) // len(key), 0)
    energy = torch.linalg.svdvals(query.double().mT @ key.double()).square()
    return energy[:, :top].sum(-1) / energy.sum(-1)


@settings(deadline=None, max_examples=30)
@given(
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.integers(1, 6),
    columns=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    top=st.integers(1, 7),
    exponent=st.sampled_from([-25, 0, 25]),
)
def test_it_is_the_share_of_the_whole_matrix(key_heads, group, width, columns, top, exponent) -> None:
    """Grouped-query heads, keys of another width (cross attention), scales whose squares float32 cannot hold."""
    torch.manual_seed(0)
    query, key = torch.randn(key_heads * group, width, columns[0]), torch.randn(key_heads, width, columns[1])
    found = qk_energy(query * 10.0**exponent, key * 10.0**exponent, top)
    assert found.shape == (key_heads * group,)
    assert torch.allclose(found.double(), by_svd(query, key, top), atol=1e-5)


def test_closed_forms() -> None:
    """Orthogonal queries and keys spread the energy evenly; equal rows have all of it in one direction."""
    torch.manual_seed(0)
    frame = torch.linalg.qr(torch.randn(3, 16, 4)).Q.mT
    assert torch.allclose(qk_energy(frame, frame), torch.full((3,), 1 / 4))
    assert torch.allclose(qk_energy(frame, frame, top=3), torch.full((3,), 3 / 4))
    alike = torch.randn(3, 1, 16).expand(3, 4, 16)
    assert torch.allclose(qk_energy(alike, torch.randn(3, 4, 16)), torch.ones(3))
    singular = torch.tensor([3.0, 2.0, 1.0, 0.0]).diag().expand(1, 4, 4)
    assert qk_energy(singular, torch.eye(4)[None]).item() == pytest.approx(9 / 14)


def test_broken_heads_are_nan_and_others_are_not() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
    query[0] = 0
    query[1, 0, 0] = math.nan
    key[2, 0, 0] = math.inf
    assert qk_energy(query, key).isnan().tolist() == [True, True, True, False]
    assert qk_energy(query.bfloat16(), key.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("query", "key", "top", "says"),
    [
        ((2, 3), (2, 3, 4), 1, "query_weight"),
        ((2, 3, 4), (2, 0, 4), 1, "key_weight"),
        ((2, 3, 4), (2, 5, 4), 1, "one d_head"),
        ((3, 3, 4), (2, 3, 4), 1, "multiple"),
        ((2, 3, 4), (2, 3, 4), 0, "top >= 1"),
    ],
)
def test_other_shapes_are_refused(query, key, top, says) -> None:
    with pytest.raises(ValueError, match=says):
        qk_energy(torch.ones(query), torch.ones(key), top)


def test_kinds_of_collapse() -> None:
    assert collapse_kind(0.4, 0.99) is None
    assert collapse_kind(math.nan, 0.99) is None
    assert collapse_kind(0.01, 0.1) == "benign"
    assert collapse_kind(0.01, 0.9) == "malignant"
    assert collapse_kind(0.1, 0.3, low_entropy=0.2, concentrated=0.25) == "malignant"
    with pytest.raises(ValueError, match="got NaN"):
        collapse_kind(0.01, math.nan)
