"""Soft cap, score_mod, the norm of the logits, keys hidden by large negative numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.attention import attention_entropy, attention_stats, attention_stats_reference, chunks, entropy_lower_bound
from trimtab.attention.checks import _broadcast

HEAD_BIAS = torch.randn(4, 40, 50, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LOGITS_PER_THREAD", 500)


@pytest.fixture
def query_and_key() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 33, 24) * 3, torch.randn(2, 2, 50, 24)


def assert_equals_reference(query: Tensor, key: Tensor, **options) -> None:
    measured = attention_stats(query, key, enable_gqa=True, **options)
    expected = attention_stats_reference(query, key, enable_gqa=True, **options)
    for one, other in zip(measured, expected, strict=True):
        # Logits below 100 in float32, and the norm of 50 of them: all within 1e-4 of float64.
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 1000.0])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "bias"])
def test_softcap(query_and_key: tuple[Tensor, Tensor], mask: str, softcap: float) -> None:
    masks = {"boolean": torch.rand(2, 1, 33, 50) < 0.5, "bias": HEAD_BIAS[:, :33]}
    assert_equals_reference(*query_and_key, softcap=softcap, is_causal=mask == "causal", attn_mask=masks.get(mask))


def test_softcap_bounds_the_logits_before_the_mask() -> None:
    query, key = torch.randn(2, 5, 8) * 100, torch.randn(2, 6, 8) * 100
    assert attention_stats(query, key, softcap=3.0).max_logit.max() <= 3
    shifted = attention_stats(query, key, softcap=3.0, attn_mask=torch.full((5, 6), 10.0)).max_logit
    assert shifted.min() >= 7
    assert shifted.max() <= 13


def alibi(score, b, h, q_idx, kv_idx):
    return score - 0.1 * (h + 1) * (q_idx - kv_idx).abs()


def captured(score, b, h, q_idx, kv_idx):
    return score + HEAD_BIAS[h, q_idx, kv_idx] * (b + 1)


def hiding(score, b, h, q_idx, kv_idx):
    return torch.where((kv_idx <= q_idx - 1 + b) & (kv_idx % 3 != 0), score.tanh(), -torch.inf)


@pytest.mark.parametrize("score_mod", [alibi, captured, hiding])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "bias"])
def test_score_mod(query_and_key: tuple[Tensor, Tensor], score_mod, mask: str) -> None:
    masks = {
        "boolean": torch.rand(2, 1, 33, 50) < 0.5,
        "bias": HEAD_BIAS[:, :33].masked_fill(torch.rand(50) < 0.1, -1e9),
    }
    assert_equals_reference(*query_and_key, score_mod=score_mod, is_causal=mask == "causal", attn_mask=masks.get(mask))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # once in a process
def test_score_mod_and_softcap_are_what_flex_attention_computes() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 16, 8), torch.randn(2, 4, 16, 8)

    def both(score, b, h, q_idx, kv_idx):
        return captured(2 * (score / 2).tanh(), b, h, q_idx, kv_idx)

    values = torch.eye(16).expand(2, 4, 16, 16)  # with these, attention returns its weights
    weights = flex_attention(query, key, values, score_mod=both)
    expected = torch.special.entr(weights).sum(-1)
    measured = attention_entropy(query, key, softcap=2.0, score_mod=captured)
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-5)


def test_score_mod_and_what_a_mask_hides() -> None:
    """What is hidden stays hidden, whatever score_mod returns there."""
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8)
    seen = torch.rand(5, 6) < 0.5
    stats = attention_stats(query, key, attn_mask=seen, score_mod=lambda score, *_: score * 0)
    assert torch.allclose(stats.entropy, seen.sum(-1).clamp(min=1).float().log().expand(1, 2, 5))


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
def test_the_norm_is_over_the_keys_that_are_seen(hidden: float) -> None:
    torch.manual_seed(0)
    logits, seen = torch.randn(3, 20, 30), torch.rand(3, 1, 30) < 0.5
    mask = torch.zeros(3, 1, 30).masked_fill(~seen, hidden)
    measured = attention_stats(logits, torch.eye(30), attn_mask=mask, scale=1.0).logit_norm
    for head in range(3):
        rows = logits[head][:, seen[head, 0]].double()
        expected = (rows - rows.mean(-1, keepdim=True)).norm(dim=-1)
        torch.testing.assert_close(measured[head].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("common", [0.0, 1e3])
def test_the_norm_of_one_high_logit_loses_no_digits(common: float) -> None:
    """Sums of squares about another number than the mean lose a digit per factor 10 in the number of keys."""
    key = torch.full((1, 16384, 1), common)
    key[0, 77] += 8.0
    norm = attention_stats(torch.ones(1, 1, 1), key, scale=1.0).logit_norm.item()
    assert norm == pytest.approx(8 * math.sqrt(1 - 1 / 16384), rel=1e-5)


def test_the_lower_bound_holds_for_the_measured_norm(query_and_key: tuple[Tensor, Tensor]) -> None:
    stats = attention_stats(*query_and_key, enable_gqa=True)
    assert (stats.entropy >= entropy_lower_bound(stats.logit_norm, 50) - 1e-5).all()


@given(*[st.lists(st.integers(0, 3), max_size=4)] * 2)
def test_shapes_broadcast_as_torch_has_it(one, two) -> None:
    try:
        expected = tuple(torch.broadcast_shapes(one, two))
    except RuntimeError:
        expected = None
    assert _broadcast(one, two) == expected
