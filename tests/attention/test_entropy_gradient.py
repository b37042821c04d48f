import pytest
import torch
from torch import Tensor

from trimtab.attention import attention_entropy, attention_stats_reference, chunks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LOGITS_PER_THREAD", 15)  # two heads, or one and its group


def inputs(heads: int = 4, key_heads: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    query = torch.randn(2, heads, 3, 4, dtype=torch.float64, requires_grad=True)
    return query, torch.randn(2, key_heads, 5, 4, dtype=torch.float64, requires_grad=True)


SEEN = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "bias", "holes"])
def test_gradcheck(mask: str, key_heads: int, softcap: float | None) -> None:
    bias = torch.randn(4, 3, 5, dtype=torch.float64)
    masks = {"boolean": SEEN, "bias": bias, "holes": bias.masked_fill(~SEEN, -torch.inf)}

    def entropy(query: Tensor, key: Tensor) -> Tensor:
        return attention_entropy(
            query,
            key,
            attn_mask=masks.get(mask),
            is_causal=mask == "causal",
            enable_gqa=key_heads == 2,
            softcap=softcap,
            scale=0.7,
        )

    assert torch.autograd.gradcheck(entropy, inputs(4, key_heads), fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (4, 1, 5), (2, 1, 3, 1), (3, 5), (1, 1)], ids=str)
def test_gradcheck_of_a_mask_that_broadcasts(shape: tuple[int, ...]) -> None:
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expanded = mask.expand(2, 4, 3, 5)
    query, key = inputs()
    assert torch.autograd.gradcheck(
        lambda q, k, m: attention_entropy(q, k, attn_mask=m, softcap=2.0), (query, key, mask), fast_mode=True
    )
    (of_mask,) = torch.autograd.grad(attention_entropy(query, key, attn_mask=mask).sum(), mask)
    (of_view,) = torch.autograd.grad(attention_entropy(query, key, attn_mask=expanded).sum(), mask)
    torch.testing.assert_close(of_mask, of_view)


@pytest.mark.parametrize("lead", [((2, 4), (1, 4)), ((4,), (2, 1)), ((), ()), ((), (3,))], ids=str)
def test_gradcheck_of_query_and_key_that_broadcast(lead: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    query = torch.randn(*lead[0], 3, 4, dtype=torch.float64, requires_grad=True)
    key = torch.randn(*lead[1], 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention_entropy, (query, key), fast_mode=True)


def test_gradient_is_that_of_the_definition_in_float32() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 40, 16, requires_grad=True), torch.randn(2, 50, 16, requires_grad=True)
    weight = torch.randn(2, 40)
    (attention_entropy(query, key) * weight).sum().backward()
    logits = query.double() @ key.double().mT / 4
    weights = logits.softmax(-1)
    entropy = -(weights * weights.log()).sum(-1)
    expected = torch.autograd.grad((entropy * weight).sum(), (query, key))
    for tensor, gradient in zip((query, key), expected, strict=True):
        assert tensor.grad.dtype == torch.float32
        # Sums of 50 products of numbers of size 1, each good to float32's rounding.
        torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=1e-5)


def test_huge_logits_and_rows_that_see_nothing_have_finite_gradients() -> None:
    query, key = torch.randn(1, 3, 4) * 1e3, torch.randn(1, 5, 4) * 1e3
    query.requires_grad_()
    attention_entropy(query, key, attn_mask=SEEN).sum().backward()
    assert query.grad.isfinite().all()
    assert query.grad[0, 1].eq(0).all()  # it sees nothing
    assert query.grad[0, 2].eq(0).all()  # it has no choice


def test_half_precision_and_autocast() -> None:
    query, key = (torch.randn(2, 6, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention_entropy(query, key).sum().backward()
    exact = tuple(tensor.detach().float().requires_grad_() for tensor in (query, key))
    attention_entropy(*exact).sum().backward()
    for tensor, other in zip((query, key), exact, strict=True):
        assert tensor.grad.dtype == torch.bfloat16
        assert torch.equal(tensor.grad, other.grad.bfloat16())


@pytest.mark.parametrize("case", ["no_grad", "detached", "boolean mask"])
def test_no_graph_where_none_is_wanted(case: str) -> None:
    query, key = inputs()
    if case == "no_grad":
        with torch.no_grad():
            assert not attention_entropy(query, key).requires_grad
    else:
        mask = SEEN if case == "boolean mask" else None
        assert not attention_entropy(query.detach(), key.detach(), attn_mask=mask).requires_grad


def test_the_value_is_the_same_with_and_without_a_graph() -> None:
    query, key = inputs()
    with_graph = attention_entropy(query, key, is_causal=True)
    assert torch.equal(with_graph, attention_entropy(query.detach(), key.detach(), is_causal=True))
    expected = attention_stats_reference(query, key, is_causal=True).entropy
    torch.testing.assert_close(with_graph.detach(), expected, rtol=0, atol=1e-13)


def test_nothing_of_the_size_of_the_logits_is_saved_for_backward() -> None:
    query, key = inputs()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
        attention_entropy(query, key)
    assert sorted(tensor.numel() for tensor in saved) == sorted([query.numel(), key.numel()])


def test_refusals() -> None:
    query, key = inputs()
    with pytest.raises(ValueError, match="score_mod is not differentiated"):
        attention_entropy(query, key, score_mod=lambda score, *_: score)
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(attention_entropy(query, key).sum(), query, create_graph=True)
