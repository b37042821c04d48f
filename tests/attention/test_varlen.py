import math

import pytest
import torch
from torch import Tensor

from trimtab.attention import attention_stats_reference, chunks
from trimtab.attention.stats import AttentionStats
from trimtab.attention.varlen import attention_stats_flash, attention_stats_varlen


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LOGITS_PER_THREAD", 300)


def reference(query: Tensor, key: Tensor, causal: bool, window: tuple[int, int], slopes: Tensor | None, **options):
    """The same with a dense mask: query (..., H, L, D), slopes (..., H)."""
    L, S = query.shape[-2], key.shape[-2]
    distance = torch.arange(L)[:, None] + S - L - torch.arange(S)  # of a query from a key, positive for earlier keys
    left, right = (math.inf if side < 0 else side for side in window)
    hidden = (distance > left) | (-distance > right) | ((distance < 0) & causal)
    bias = torch.zeros(L, S) if slopes is None else -slopes[..., None, None] * distance.abs()
    return attention_stats_reference(
        query, key, attn_mask=bias.masked_fill(hidden, -torch.inf), enable_gqa=True, **options
    )


def assert_equal(measured: AttentionStats, expected: AttentionStats) -> None:
    for one, other in zip(measured, expected, strict=True):
        # Logits below 30, in float32.
        torch.testing.assert_close(one.double(), other, rtol=0, atol=5e-5)


@pytest.mark.parametrize("slopes", ["none", "per head", "per example"])
@pytest.mark.parametrize("window", [(-1, -1), (3, 2), (0, -1), (-2, 1), (100, 100), (0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("L", "S"), [(17, 17), (5, 20), (20, 5)], ids=str)
def test_dense(L: int, S: int, causal: bool, window: tuple[int, int], slopes: str) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, L, 4, 8) * 2, torch.randn(2, S, 2, 8)
    m = {"none": None, "per head": torch.rand(4), "per example": torch.rand(2, 4)}[slopes]
    measured = attention_stats_flash(query, key, is_causal=causal, window=window, alibi_slopes=m, softcap=3.0)
    expected = reference(query.transpose(1, 2), key.transpose(1, 2), causal, window, m, softcap=3.0)
    assert_equal(measured, expected)


def test_a_window_costs_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of a long sequence are compared with the keys in their window, not with all."""
    monkeypatch.setattr(chunks, "LOGITS_PER_THREAD", 2**12)
    widths: list[int] = []
    row_sums_ = chunks.row_sums_

    def counted(logits: Tensor, *rest) -> None:
        widths.append(logits.numel())
        row_sums_(logits, *rest)

    monkeypatch.setattr(chunks, "row_sums_", counted)
    attention_stats_flash(torch.randn(1, 2000, 1, 4), torch.randn(1, 2000, 1, 4), is_causal=True, window=(15, 0))
    assert 2000 * 16 <= sum(widths) + 16 * 16 <= 2000 * 16 * 3


@pytest.mark.parametrize(
    "slopes", [None, torch.rand(4, generator=torch.Generator().manual_seed(0))], ids=["none", "alibi"]
)
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, (4, -1)), (False, (2, 3))], ids=str)
def test_packed_sequences_are_those_one_by_one(
    causal: bool, window: tuple[int, int] | None, slopes: Tensor | None
) -> None:
    torch.manual_seed(0)
    q_ends, k_ends = [0, 7, 7, 8, 30], [0, 9, 12, 13, 25]
    query, key = torch.randn(30, 4, 8) * 2, torch.randn(25, 2, 8)
    measured = attention_stats_varlen(
        query,
        key,
        torch.tensor(q_ends, dtype=torch.int32),
        torch.tensor(k_ends, dtype=torch.int32),
        is_causal=causal,
        window=window,
        scale=0.5,
        softcap=4.0,
        alibi_slopes=slopes,
    )
    assert measured.entropy.shape == (4, 30)
    for b in (0, 2, 3):
        q, k = query[q_ends[b] : q_ends[b + 1]].transpose(0, 1), key[k_ends[b] : k_ends[b + 1]].transpose(0, 1)
        expected = reference(q, k, causal, window or (-1, -1), slopes, scale=0.5, softcap=4.0)
        assert_equal(AttentionStats(*(numbers[:, q_ends[b] : q_ends[b + 1]] for numbers in measured)), expected)


def test_a_sequence_without_keys_sees_nothing() -> None:
    stats = attention_stats_varlen(torch.randn(5, 2, 4), torch.randn(3, 2, 4), [0, 2, 5], [0, 0, 3])
    assert stats.entropy[:, :2].eq(0).all()
    assert stats.logit_norm[:, :2].eq(0).all()
    assert stats.max_logit[:, :2].eq(-math.inf).all()
    assert stats.entropy[:, 2:].gt(0).all()


Q, K = torch.zeros(6, 4, 8), torch.zeros(5, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((None, K, [0, 6], [0, 5]), {}, TypeError, "query to be a tensor"),
        ((Q.int(), K, [0, 6], [0, 5]), {}, TypeError, "floating-point"),
        ((Q[0], K, [0, 6], [0, 5]), {}, ValueError, r"query of shape \(T, H, D\)"),
        ((Q, K[..., :7], [0, 6], [0, 5]), {}, ValueError, "same, positive D"),
        ((Q[:, :3], K, [0, 6], [0, 5]), {}, ValueError, "multiple of the key's"),
        ((Q, K, [0, 7], [0, 5]), {}, ValueError, "cu_seqlens_q to rise from 0 to the 6 tokens"),
        ((Q, K, [1, 6], [0, 5]), {}, ValueError, "cu_seqlens_q to rise from 0"),
        ((Q, K, [0, 6], [0, 4, 3, 5]), {}, ValueError, "cu_seqlens_k to rise from 0 to the 5"),
        ((Q, K, [0, 3, 6], [0, 5]), {}, ValueError, "got 2 and 1"),
        ((Q, K, [0.0, 6.0], [0, 5]), {}, ValueError, "two integers"),
        ((Q, K, torch.tensor(6), [0, 5]), {}, ValueError, "two integers"),
        ((Q, K, [0, 6], [0, 5]), {"softcap": -1.0}, ValueError, "softcap > 0"),
        ((Q, K, [0, 6], [0, 5]), {"softcap": "x"}, TypeError, "softcap to be a number"),
        ((Q, K, [0, 6], [0, 5]), {"scale": "x"}, TypeError, "scale to be a number"),
        ((Q, K, [0, 6], [0, 5]), {"window": ("x", 0)}, ValueError, "below 0 for no limit"),
        ((Q, K, [0, 6], [0, 5]), {"window": 3}, ValueError, r"a window \(left, right\)"),
        (
            (Q, K, [0, 6], [0, 5]),
            {"alibi_slopes": torch.rand(3)},
            ValueError,
            r"alibi_slopes of shape \(4,\) or \(1, 4\)",
        ),
    ],
)
def test_refusals(arguments, options, error, says) -> None:
    with pytest.raises(error, match=says):
        attention_stats_varlen(*arguments, **options)


@pytest.mark.parametrize(
    ("query", "key", "says"),
    [
        (Q, K[None], r"query of shape \(B, L, H, D\)"),
        (Q[None], K[None, :0], "at least one key"),
        (Q[None], K.expand(2, -1, -1, -1), "same batch"),
        (Q[None], K[None].to("meta"), "one device"),
    ],
)
def test_dense_refusals(query: Tensor, key: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        attention_stats_flash(query, key)
