import pytest
import torch

from trimtab.attention import attention_entropy, chunks
from trimtab.attention.sampled import attention_entropy_sampled


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0, "enable_gqa": True}], ids=str)
def test_all_queries_give_the_exact_mean(options: dict) -> None:
    query, key = torch.randn(2, 4, 30, 8), torch.randn(2, 2 if "enable_gqa" in options else 4, 40, 8)
    estimate = attention_entropy_sampled(query, key, num_queries=30, generator=generator(), **options)
    assert torch.equal(estimate.standard_error, torch.zeros(2, 4))
    torch.testing.assert_close(estimate.mean, attention_entropy(query, key, **options).mean(-1))


@pytest.mark.parametrize("kind", ["plain", "causal", "boolean", "row bias", "score_mod"])
def test_is_the_mean_over_the_queries_drawn(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LOGITS_PER_THREAD", 100)
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 30, 8), torch.randn(2, 3, 40, 8)
    options = {
        "plain": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": torch.rand(2, 1, 30, 40) < 0.5},
        "row bias": {"attn_mask": torch.randn(1, 40)},
        "score_mod": {"score_mod": lambda score, b, h, q_idx, kv_idx: score - 0.1 * (q_idx - kv_idx).abs()},
    }[kind]
    estimate = attention_entropy_sampled(query, key, num_queries=7, generator=generator(), **options)
    drawn = torch.randperm(30, generator=generator())[:7]
    entropy = attention_entropy(query, key, **options)[..., drawn].double()
    torch.testing.assert_close(estimate.mean.double(), entropy.mean(-1), rtol=0, atol=1e-5)
    expected = (entropy.var(-1) / 7 * (1 - 7 / 30)).sqrt()
    torch.testing.assert_close(estimate.standard_error.double(), expected, rtol=0, atol=1e-5)


def test_the_standard_error_is_calibrated() -> None:
    """Over many draws, the squared errors are on average the squared standard error, which is unbiased."""
    torch.manual_seed(0)
    query = torch.randn(3, 60, 8) * torch.tensor([0.5, 2.0, 6.0])[:, None, None]
    key = torch.randn(3, 50, 8)
    exact = attention_entropy(query, key).mean(-1)
    draws = generator(1)
    estimates = [attention_entropy_sampled(query, key, num_queries=20, generator=draws) for _ in range(500)]
    errors = torch.stack([estimate.mean - exact for estimate in estimates])
    claimed = torch.stack([estimate.standard_error for estimate in estimates])
    # 500 draws estimate a variance to sqrt(2 / 500) = 6.3 %; four times that, for three heads and a fixed seed.
    assert ((errors**2).mean(0) / (claimed**2).mean(0)).log().abs().max() < 0.25
    assert (errors.mean(0).abs() < 4 * claimed.mean(0) / 500**0.5).all()
    # Student's t with 19 degrees of freedom: 95 % lie within 2.09.
    covered = (errors.abs() <= 2.09 * claimed).double().mean(0)
    assert (covered - 0.95).abs().max() < 0.04


def test_draws_from_its_generator_alone() -> None:
    query, key = torch.randn(2, 30, 8, requires_grad=True), torch.randn(2, 30, 8)
    before = torch.get_rng_state()
    first = attention_entropy_sampled(query, key, num_queries=5, generator=generator(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.mean.requires_grad
    again = attention_entropy_sampled(query, key, num_queries=5, generator=generator(3))
    assert torch.equal(first.mean, again.mean)


def test_matrices_are_one_head() -> None:
    estimate = attention_entropy_sampled(torch.randn(9, 8), torch.randn(5, 8), num_queries=4, generator=generator())
    assert estimate.mean.shape == estimate.standard_error.shape == ()


@pytest.mark.parametrize("num_queries", [0, 1, 31])
def test_refuses_numbers_that_make_no_sample(num_queries: int) -> None:
    query, key = torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    with pytest.raises(ValueError, match="between 2 and the 30"):
        attention_entropy_sampled(query, key, num_queries=num_queries, generator=generator())


def test_refuses_what_is_no_number_of_queries() -> None:
    query, key = torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    with pytest.raises(TypeError, match=r"num_queries to be an integer, got 2\.5"):
        attention_entropy_sampled(query, key, num_queries=2.5, generator=generator())


def test_refuses_the_global_generator() -> None:
    with pytest.raises(TypeError, match="Generator of its own"):
        attention_entropy_sampled(torch.randn(2, 30, 8), torch.randn(2, 30, 8), num_queries=3, generator=None)
