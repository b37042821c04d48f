import math

import pytest
import torch

from trimtab.attention import attention_stats_reference, chunks, entropy_lower_bound
from trimtab.watch.signals import head_stats, merge
from trimtab.watch.signals.heads import per_head_stats


def test_head_stats_are_means_and_maxima_over_batch_and_queries() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(3, 2, 5, 8) * 4, torch.randn(3, 2, 7, 8) * 4
    stats = head_stats(query, key)
    reference = attention_stats_reference(query, key)
    assert torch.allclose(stats.entropy.double(), reference.entropy.mean((0, 2)), atol=1e-5)
    assert torch.allclose(stats.normalized.double(), reference.entropy.mean((0, 2)) / math.log(7), atol=1e-5)
    assert torch.allclose(stats.max_logit.double(), reference.max_logit.amax((0, 2)), atol=1e-4)
    assert torch.allclose(stats.logit_norm.double(), reference.logit_norm.mean((0, 2)), atol=1e-4)
    bound = entropy_lower_bound(reference.logit_norm, 7).mean((0, 2))
    assert torch.allclose(stats.bound.double(), bound, atol=1e-4)
    assert (stats.bound < stats.entropy).all()


@pytest.mark.parametrize("kind", ["causal", "boolean", "-inf", "finfo", "-1e9", "-1e4"])
def test_even_attention_is_1_whatever_may_be_seen(kind: str) -> None:
    """Equal logits over the visible keys are the maximum of every query, and queries without a choice count not."""
    query, key = torch.zeros(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    hidden = {"-inf": -math.inf, "finfo": torch.finfo(torch.float32).min, "-1e9": -1e9, "-1e4": -1e4}.get(kind)
    mask = None if kind == "causal" else seen if hidden is None else torch.zeros(6, 6).masked_fill(~seen, hidden)
    stats = head_stats(query, key, attn_mask=mask, is_causal=kind == "causal")
    assert torch.allclose(stats.normalized, torch.ones(3), atol=1e-6)
    assert torch.allclose(stats.entropy, torch.arange(1.0, 7).log().mean().expand(3), atol=1e-6)


def test_padding_by_a_broadcast_mask() -> None:
    keep = torch.tensor([[True, True, True, False], [True, True, False, False]])[:, None, None]
    stats = head_stats(torch.zeros(2, 2, 5, 4), torch.randn(2, 2, 4, 4), attn_mask=keep)
    assert torch.allclose(stats.normalized, torch.ones(2), atol=1e-6)
    assert torch.allclose(stats.entropy, torch.full((2,), (math.log(3) + math.log(2)) / 2), atol=1e-6)


def test_no_choice_has_no_normalized_entropy() -> None:
    stats = head_stats(torch.randn(2, 3, 4, 8), torch.randn(2, 3, 1, 8))
    assert stats.entropy.tolist() == stats.bound.tolist() == stats.logit_norm.tolist() == [0, 0, 0]
    assert stats.normalized.isnan().all()


def test_queries_that_see_nothing_are_left_out() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    mask[1, :, 2:] = False
    stats = head_stats(query, key, attn_mask=mask)
    entropy = attention_stats_reference(query, key).entropy
    expected = (entropy[0].sum(-1) + entropy[1, :, :2].sum(-1)) / 6
    assert torch.allclose(stats.entropy.double(), expected, atol=1e-5)
    assert torch.allclose(stats.normalized.double(), expected / math.log(5), atol=1e-5)
    nothing = head_stats(query, key, attn_mask=mask[1:, :, 2:3])
    assert nothing.entropy.isnan().all()
    assert nothing.bound.isnan().all()


@pytest.mark.parametrize("kind", ["causal", "boolean", "additive", "score_mod"])
@pytest.mark.parametrize("at_once", [20, 2**18])
def test_the_bound_uses_the_keys_that_each_query_sees(kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one high logit among equal ones the bound is the entropy itself, whatever else is hidden."""
    monkeypatch.setattr(chunks, "LOGITS_PER_THREAD", at_once)
    query, key = torch.ones(2, 3, 9, 1), torch.zeros(2, 3, 9, 1)
    key[:, :, 0] = 3.0
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    options = {
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": seen},
        "additive": {"attn_mask": torch.zeros(9, 9).masked_fill(~seen, -1e9)},
        "score_mod": {"score_mod": lambda s, b, h, q_idx, kv_idx: torch.where(q_idx >= kv_idx, s, -torch.inf)},
    }[kind]
    stats = head_stats(query, key, **options)
    assert torch.allclose(stats.bound, stats.entropy, atol=1e-6)
    assert stats.entropy.min() > 0.1


def test_per_head_stats_of_packed_sequences() -> None:
    stats = attention_stats_reference(torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    keys = torch.tensor([1, 2, 3, 4, 5])
    assert torch.allclose(per_head_stats(stats, keys).normalized, (stats.entropy[:, 1:] / keys[1:].log()).mean(1))


def test_nan_is_seen() -> None:
    query = torch.randn(2, 3, 4, 8)
    query[0, 1, 2] = math.nan
    stats = head_stats(query, torch.randn(2, 3, 5, 8))
    for numbers in stats:
        assert numbers.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (4, 2, 3)], ids=str)
def test_heads_are_the_last_dimension_but_two(lead: tuple[int, ...]) -> None:
    query, key = torch.randn(*lead, 4, 8), torch.randn(*lead, 6, 8)
    expected = attention_stats_reference(query, key).entropy.reshape(-1, *lead[-1:], 4).mean((0, -1))
    assert head_stats(query, key).entropy.tolist() == pytest.approx(expected.reshape(-1).tolist(), abs=1e-5)


def test_merge_averages_entropies_and_keeps_the_largest_logit() -> None:
    torch.manual_seed(0)
    one, two = (head_stats(torch.randn(n, 2, 4, 8), torch.randn(n, 2, 4, 8)) for n in (1, 3))
    both = merge([one, two])
    assert torch.equal(both.entropy, (one.entropy + two.entropy) / 2)
    assert torch.equal(both.normalized, (one.normalized + two.normalized) / 2)
    assert torch.equal(both.max_logit, torch.maximum(one.max_logit, two.max_logit))
    assert torch.equal(both.logit_norm, (one.logit_norm + two.logit_norm) / 2)
    assert torch.equal(both.bound, (one.bound + two.bound) / 2)
    assert merge([one]) is one


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8)], ids=["no example", "no query"])
def test_of_nothing_there_is_no_number(shape: tuple[int, ...]) -> None:
    stats = head_stats(torch.randn(shape), torch.randn(shape[0], 3, 5, 8))
    assert all(numbers.shape == (3,) and numbers.isnan().all() for numbers in stats)
