import math

import pytest
import torch
from torch import nn

from trimtab.attention import attention_stats_reference
from trimtab.watch.signals import gradient_norm, head_stats, merge, plain_sigmas, visible_keys


def test_head_stats_are_means_and_maxima_over_batch_and_queries() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(3, 2, 5, 8) * 4, torch.randn(3, 2, 7, 8) * 4
    stats = head_stats(query, key)
    reference = attention_stats_reference(query, key)
    assert torch.allclose(stats.entropy.double(), reference.entropy.mean((0, 2)), atol=1e-5)
    assert torch.allclose(stats.normalized.double(), reference.entropy.mean((0, 2)) / math.log(7), atol=1e-5)
    assert torch.allclose(stats.max_logit.double(), reference.max_logit.amax((0, 2)), atol=1e-4)


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
    assert stats.entropy.tolist() == [0, 0, 0]
    assert stats.normalized.isnan().all()


def test_nan_is_seen() -> None:
    query = torch.randn(2, 3, 4, 8)
    query[0, 1, 2] = math.nan
    stats = head_stats(query, torch.randn(2, 3, 5, 8))
    for numbers in stats:
        assert numbers.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("lead", [(), (5,)], ids=str)
def test_without_a_dimension_of_heads_it_is_one_head(lead: tuple[int, ...]) -> None:
    query, key = torch.randn(*lead, 4, 8), torch.randn(*lead, 6, 8)
    stats = head_stats(query, key)
    assert stats.entropy.shape == (1,)
    expected = attention_stats_reference(query, key).entropy.mean().item()
    assert stats.entropy.item() == pytest.approx(expected, abs=1e-5)


def test_visible_keys() -> None:
    assert visible_keys(4, 3, is_causal=True).tolist() == [1, 2, 3, 3]
    assert visible_keys(4, 3).tolist() == [3]
    assert visible_keys(2, 3, torch.tensor([[True], [False]])).tolist() == [3, 0]


def test_merge_averages_entropies_and_keeps_the_largest_logit() -> None:
    torch.manual_seed(0)
    one, two = (head_stats(torch.randn(n, 2, 4, 8), torch.randn(n, 2, 4, 8)) for n in (1, 3))
    both = merge([one, two])
    assert torch.equal(both.entropy, (one.entropy + two.entropy) / 2)
    assert torch.equal(both.normalized, (one.normalized + two.normalized) / 2)
    assert torch.equal(both.max_logit, torch.maximum(one.max_logit, two.max_logit))


def test_gradient_norm() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(1))]
    assert gradient_norm(parameters) is None
    parameters[0].grad = torch.tensor([3e30, 0.0])  # squares that float32 cannot hold
    parameters[1].grad = torch.zeros(3, 2)
    parameters[1].grad[2, 1] = 4e30
    assert gradient_norm(parameters) == pytest.approx(5e30, rel=1e-6)
    parameters[2].grad = torch.tensor([math.nan])
    assert math.isnan(gradient_norm(parameters))


def test_gradient_norm_of_sparse_and_half_gradients() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([3, 3, 7])).sum().backward()  # row 3 twice: its gradient is 2
    assert gradient_norm(embedding.parameters()) == pytest.approx(math.sqrt(4 * 4 + 4))
    half = nn.Parameter(torch.zeros(100, dtype=torch.bfloat16))
    half.grad = torch.ones(100, dtype=torch.bfloat16)
    assert gradient_norm([half]) == pytest.approx(10)


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.positions = nn.Parameter(torch.randn(1, 5, 6))
        self.conv = nn.Conv2d(3, 6, 2)
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.linear = nn.Linear(6, 4).bfloat16()
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embedding.weight
        self.again = nn.Linear(6, 4)
        self.again.weight = self.linear.weight


def test_plain_sigmas_of_every_matrix_once() -> None:
    torch.manual_seed(0)
    zoo = Zoo()
    starts: dict[str, torch.Tensor] = {}
    random_state = torch.get_rng_state()
    sigmas = plain_sigmas(zoo, [], starts)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert sigmas.keys() == starts.keys()
    names = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "linear.weight"]
    assert list(sigmas) == names
    for name, (sigma,) in sigmas.items():
        exact = torch.linalg.matrix_norm(zoo.get_parameter(name).detach().double().flatten(1), 2).item()
        assert sigma == pytest.approx(exact, rel=1e-4)
    assert list(plain_sigmas(zoo, names[:3], {})) == names[3:]


def test_plain_sigmas_of_a_large_matrix_start_from_the_last_vector_and_follow_it() -> None:
    torch.manual_seed(0)
    model, starts = nn.Sequential(nn.Linear(200, 300)), {}
    plain_sigmas(model, [], starts)
    assert starts["0.weight"].shape == (200,)
    with torch.no_grad():
        model[0].weight[7] += 0.3
    (sigma,) = plain_sigmas(model, [], starts)["0.weight"]
    assert sigma == pytest.approx(torch.linalg.matrix_norm(model[0].weight, 2).item(), rel=1e-4)


def test_plain_sigmas_of_a_broken_weight_is_nan() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = math.inf
    sigmas = plain_sigmas(model, [], {})
    assert sigmas["0.weight"][0] > 0
    assert math.isnan(sigmas["1.weight"][0])
