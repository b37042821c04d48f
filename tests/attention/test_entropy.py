import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.attention import attention_entropy, attention_stats, attention_stats_reference, chunks

EPS32 = torch.finfo(torch.float32).eps
NATS = 1e-4  # what float32 sums of a few thousand exponentials are good for


def mask_of(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    """A mask of one kind; the boolean ones and "holes" hide every key from the first query."""
    if kind == "none":
        return None
    if kind == "additive":
        return torch.randn(shape)
    seen = torch.rand(shape) < 0.5
    seen.view(-1, shape[-1])[0] = False
    return seen if kind == "boolean" else torch.randn(shape).masked_fill(~seen, -torch.inf)


def assert_close(measured: Tensor, expected: Tensor, tolerance: float) -> None:
    assert measured.shape == expected.shape
    infinite = expected.isinf()
    assert torch.equal(measured.isinf(), infinite)
    error = (measured.double() - expected)[~infinite].abs()
    assert not error.isnan().any()
    assert error.numel() == 0 or error.max() <= tolerance


def norm_tolerance(norms: Tensor) -> float:
    """Ten roundings of the largest: a sum of a few squares, about a mean that is itself rounded."""
    return 10 * EPS32 * norms.max().item() + 1e-30


@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "holes"])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 17), (4, 300), (3, 7, 64), (2, 2, 3, 9, 130)], ids=str)
def test_equals_the_definition_on_the_same_float32_logits(shape: tuple[int, ...], size: float, mask: str) -> None:
    torch.manual_seed(0)
    logits = (torch.rand(shape) * 2 - 1) * size
    attn_mask = mask_of(mask, shape)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        # Added beforehand, so that the float32 logits are exactly those of the reference.
        logits, attn_mask = logits + attn_mask.nan_to_num(neginf=0), attn_mask.isneginf() * -torch.inf
        attn_mask = attn_mask.nan_to_num(nan=0, neginf=-torch.inf)
    keys = torch.eye(shape[-1])  # query @ identity: the product is exact
    measured = attention_stats(logits, keys, attn_mask=attn_mask, scale=1.0)
    expected = attention_stats_reference(logits, keys, attn_mask=attn_mask, scale=1.0)
    assert_close(measured.entropy, expected.entropy, NATS)
    assert (measured.entropy >= 0).all()
    assert_close(measured.logit_norm, expected.logit_norm, norm_tolerance(expected.logit_norm))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_equals_the_definition_on_any_logits(data: st.DataObject) -> None:
    """Hypothesis looks for rows with ties, near ties and huge gaps, and for chunk borders."""
    L, S = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    number = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1e4, -1e4, 9999.999])
    logits = torch.tensor(data.draw(st.lists(number, min_size=L * S, max_size=L * S)), dtype=torch.float32).view(
        1, L, S
    )
    kind = data.draw(st.sampled_from(["none", "causal", "boolean", "-inf", "-1e9"]))
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=S, max_size=S))).expand(L, S)
    hidden = {"-inf": -math.inf, "-1e9": -1e9}.get(kind)
    mask = seen if kind == "boolean" else None if hidden is None else torch.zeros(L, S).masked_fill(~seen, hidden)
    if kind == "-1e9":  # added beforehand, so that the float32 logits are exactly those of the reference
        logits = logits + mask
        mask = torch.zeros(L, S)
    causal = kind == "causal"
    at_once = data.draw(st.sampled_from([1, 7, 16, 2**20]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LOGITS_PER_THREAD", at_once)
        measured = attention_stats(logits, torch.eye(S), attn_mask=mask, is_causal=causal, scale=1.0)
    expected = attention_stats_reference(logits, torch.eye(S), attn_mask=mask, is_causal=causal, scale=1.0)
    assert_close(measured.entropy, expected.entropy, NATS)
    assert_close(measured.max_logit, expected.max_logit, 0)  # a maximum is one of the logits
    # The logarithm of the sum is good to float32's spacing at the size of the maximum.
    largest = expected.max_logit.nan_to_num(neginf=0).abs().max().item()
    assert_close(measured.logsumexp, expected.logsumexp, 1e-5 + EPS32 * largest)
    assert_close(measured.logit_norm, expected.logit_norm, norm_tolerance(expected.logit_norm))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_float64_whatever_the_call(data: st.DataObject) -> None:
    """Hypothesis mixes shapes, masks, head groups, caps, types and chunk sizes."""
    B, key_heads, group, L, S, D = (data.draw(st.integers(1, n)) for n in (2, 2, 3, 9, 9, 5))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    query = (torch.randn(B, key_heads * group, L, D) * data.draw(st.sampled_from([1, 10]))).to(dtype)
    key = (torch.randn(B, key_heads, S, D) * data.draw(st.sampled_from([1, 10]))).to(dtype)
    kind = data.draw(st.sampled_from(["none", "causal", "boolean", "additive", "holes"]))
    options = {
        "attn_mask": None if kind == "causal" else mask_of(kind, data.draw(st.sampled_from([(B, 1, L, S), (1, S)]))),
        "is_causal": kind == "causal",
        "enable_gqa": group > 1,
        "softcap": data.draw(st.sampled_from([None, 5.0])),
        "scale": data.draw(st.sampled_from([None, 0.3])),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LOGITS_PER_THREAD", data.draw(st.sampled_from([5, 50, 2**18])))
        measured = attention_stats(query, key, **options)
    expected = attention_stats_reference(query, key, **options)
    seen = expected.max_logit.isfinite()
    # Not of the maximum alone: a logit that is lower than it is large carries the larger error.
    largest = (query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max()).item()
    for one, other in zip(measured, expected, strict=True):
        assert one.dtype == torch.float32
        assert_close(one[seen], other[seen], NATS + 4 * EPS32 * largest)
        assert torch.equal(one[~seen].double(), other[~seen])


@pytest.mark.parametrize("at_once", [200, 2000, 2**20])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "holes", "causal"])
@pytest.mark.parametrize("size", [1.0, 30.0])  # of query and key: logits up to about 1e4
@pytest.mark.parametrize(
    ("heads", "key_heads", "L", "S"), [(3, 3, 33, 70), (4, 4, 70, 33), (6, 2, 17, 17), (4, 1, 1, 50)]
)
def test_equals_float64_from_query_and_key(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    key_heads: int,
    L: int,
    S: int,
    size: float,
    mask: str,
    at_once: int,
) -> None:
    monkeypatch.setattr(chunks, "LOGITS_PER_THREAD", at_once)
    torch.manual_seed(1)
    query, key = torch.randn(2, heads, L, 24) * size, torch.randn(2, key_heads, S, 24) * size
    gqa, causal = heads != key_heads, mask == "causal"
    attn_mask = None if causal else mask_of(mask, (2, 1, L, S))
    measured = attention_stats(query, key, attn_mask=attn_mask, is_causal=causal, enable_gqa=gqa)
    expected = attention_stats_reference(query, key, attn_mask=attn_mask, is_causal=causal, enable_gqa=gqa)
    # float32 logits carry errors of their own: entropy cannot be better than they are.
    largest = expected.max_logit[expected.max_logit.isfinite()].abs().max().item()
    for name in ("entropy", "max_logit", "logsumexp"):
        assert_close(getattr(measured, name), getattr(expected, name), NATS + 4 * EPS32 * largest)
    # The norm of up to 70 such errors.
    tolerance = norm_tolerance(expected.logit_norm) + 70**0.5 * 4 * EPS32 * largest
    assert_close(measured.logit_norm, expected.logit_norm, tolerance)


def test_float64_stays_float64() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 6, 8, dtype=torch.float64)
    measured = attention_entropy(query, key)
    assert measured.dtype == torch.float64
    assert_close(measured, attention_stats_reference(query, key).entropy, 1e-14)


def test_known_values() -> None:
    query = torch.zeros(1, 2, 3, 4)
    key = torch.randn(1, 2, 8, 4)
    assert torch.allclose(attention_entropy(query, key), torch.tensor(math.log(8)))  # attention spread evenly
    causal = attention_entropy(query, key, is_causal=True)[0, 0]
    assert torch.allclose(causal, torch.tensor([1.0, 2.0, 3.0]).log())
    assert attention_entropy(query, key[..., :1, :]).eq(0).all()  # one key: no choice


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_fully_masked_query_has_entropy_zero_and_no_nan(kind: str) -> None:
    seen = torch.tensor([[True, True, False], [False, False, False]])
    mask = seen if kind == "boolean" else torch.zeros(2, 3).masked_fill(~seen, -torch.inf)
    stats = attention_stats(torch.randn(1, 2, 4), torch.randn(1, 3, 4), attn_mask=mask)
    assert stats.entropy[0, 1] == stats.logit_norm[0, 1] == 0
    assert stats.entropy[0, 0] > 0
    assert stats.max_logit[0, 1] == stats.logsumexp[0, 1] == -torch.inf


def test_nan_is_not_hidden() -> None:
    query, key = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    query[0, 1, 0] = torch.nan
    for numbers in attention_stats(query, key):
        assert numbers[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(2, 4, 20, 16) * 8).to(dtype), (torch.randn(2, 4, 30, 16) * 8).to(dtype)
    measured = attention_entropy(query, key)
    assert measured.dtype == torch.float32
    expected = attention_stats_reference(query, key)
    assert_close(measured, expected.entropy, NATS + 4 * EPS32 * expected.max_logit.max().item())


def test_autocast_and_lower_matmul_precision_change_nothing() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 20, 64) * 8, torch.randn(2, 4, 30, 64) * 8
    alone = attention_entropy(query, key)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(attention_entropy(query, key), alone)
            assert (query @ key.mT).dtype == torch.bfloat16  # the user's autocast is still on
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_is_detached_and_leaves_its_input_alone() -> None:
    query, key = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.randn(3, 3, requires_grad=True)
    copies = [tensor.detach().clone() for tensor in (query, key, mask)]
    random_state = torch.get_rng_state()
    stats = attention_stats(query, key, attn_mask=mask)
    assert not any(numbers.requires_grad for numbers in stats)
    assert all(torch.equal(a, b) for a, b in zip((query, key, mask), copies, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("query", "key", "mask"),
    [
        ((5, 8), (6, 8), (5, 6)),
        ((3, 5, 8), (1, 6, 8), (5, 6)),
        ((2, 3, 5, 8), (3, 6, 8), (1, 6)),
        ((1, 3, 5, 8), (2, 1, 6, 8), (2, 1, 5, 1)),
        ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8), (3, 1, 5, 6)),
    ],
    ids=str,
)
def test_broadcasts_like_torch(query: tuple[int, ...], key: tuple[int, ...], mask: tuple[int, ...]) -> None:
    q, k, seen = torch.randn(query), torch.randn(key), torch.rand(mask) < 0.7
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=seen)
    measured = attention_entropy(q, k, attn_mask=seen)
    assert measured.shape == attended.shape[:-1]
    assert_close(measured, attention_stats_reference(q, k, attn_mask=seen).entropy, NATS)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)], ids=str)
def test_no_queries_no_numbers(shape: tuple[int, ...]) -> None:
    assert attention_entropy(torch.randn(shape), torch.randn(*shape[:2], 5, 4)).shape == shape[:-1]


class LargestTensor(TorchDispatchMode):
    """Records the largest memory any operation's result holds, in bytes (a view holds what it looks into)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "gqa"])
def test_no_matrix_of_a_whole_head_is_stored(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LOGITS_PER_THREAD", 2**14)
    L = 1024
    query = torch.randn(1, 2, L, 8)
    key = torch.randn(1, 1 if case == "gqa" else 2, L, 8)
    mask = torch.ones(1, L, dtype=torch.bool) if case == "mask" else None
    with LargestTensor() as seen:
        attention_stats(query, key, attn_mask=mask, is_causal=case == "causal", enable_gqa=case == "gqa")
    assert 0 < seen.bytes <= 8 * 4 * chunks.LOGITS_PER_THREAD < 4 * L * L


def test_many_heads_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LOGITS_PER_THREAD", 2**13)
    query = torch.randn(128, 8, 32, 4)
    with LargestTensor() as seen:
        attention_stats(query, query)
    results = 5 * 4 * query.shape[:-1].numel()  # five numbers for every query
    assert seen.bytes <= max(results, 8 * 4 * chunks.LOGITS_PER_THREAD) < 4 * 128 * 8 * 32 * 32


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 6, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((None, K), {}, TypeError, "query to be a tensor, got NoneType"),
        ((Q, K.long()), {}, TypeError, "key to be a dense, floating-point tensor"),
        ((torch.nested.as_nested_tensor([Q[0], Q[1]], layout=torch.jagged), K), {}, TypeError, "a nested one"),
        ((Q, K[0, 0, 0]), {}, ValueError, "key of shape"),
        ((Q, K[..., :7]), {}, ValueError, "same, positive D"),
        ((Q[..., :0], K[..., :0]), {}, ValueError, "positive D"),
        ((Q, K[..., :0, :]), {}, ValueError, "at least one key"),
        ((Q, K[:, :2]), {}, ValueError, "enable_gqa=True"),
        ((Q, torch.zeros(3, 4, 6, 8)), {}, ValueError, "same batch and heads"),
        ((Q, K[:, :3]), {"enable_gqa": True}, ValueError, "multiple of the key's heads"),
        ((Q[0, 0], K[0, 0]), {"enable_gqa": True}, ValueError, "multiple of the key's heads"),
        ((Q, K), {"attn_mask": torch.ones(5, 6).bool(), "is_causal": True}, ValueError, "drop one"),
        ((Q, K), {"attn_mask": [[True]]}, TypeError, "attn_mask to be a tensor"),
        ((Q, K), {"attn_mask": torch.ones(5, 6).long()}, TypeError, "True takes part"),
        ((Q, K), {"attn_mask": causal_lower_right(5, 6)}, TypeError, "got a CausalBias"),
        ((Q, K), {"attn_mask": torch.ones(5, 7)}, ValueError, r"\(2, 4, 5, 6\), got \(5, 7\)"),
        ((Q, K), {"attn_mask": torch.ones(3, 1, 1, 5, 6)}, ValueError, "broadcastable"),
        ((Q, K), {"attn_mask": torch.ones(6)}, ValueError, "broadcastable"),
        ((Q, K.to("meta")), {}, ValueError, "one device"),
        ((Q, K), {"softcap": 0.0}, ValueError, "softcap > 0"),
        ((Q, K), {"softcap": math.nan}, ValueError, "softcap > 0"),
        ((Q, K), {"softcap": "x"}, TypeError, "softcap to be a number or None, got 'x'"),
        ((Q, K), {"scale": "x"}, TypeError, "scale to be a number or None, got 'x'"),
        ((Q, K), {"score_mod": 3}, TypeError, r"score_mod\(score, b, h, q_idx, kv_idx\)"),
        ((Q[0], K[0]), {"score_mod": lambda s, *_: s}, ValueError, r"\(B, H, L, D\) for score_mod"),
        ((Q, K), {"attn_mask": torch.ones(5, 6, device="meta")}, ValueError, "attn_mask on cpu"),
    ],
)
def test_refusals_say_what_was_expected(arguments, options, error, says) -> None:
    with pytest.raises(error, match=says):
        attention_stats(*arguments, **options)
    with pytest.raises(error, match=says):
        attention_entropy(*arguments, **options)
