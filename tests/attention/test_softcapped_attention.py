"""Soft-capped attention against its definition, and against torch's own attention where the cap is far away."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.attention.softcap import softcapped_attention


def _by_definition(query: Tensor, key: Tensor, value: Tensor, c: float, visible: Tensor, scale: float) -> Tensor:
    """One head at a time, one query at a time, over the keys that it sees."""
    output = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                seen = visible[b, h, i].nonzero().flatten()
                logits = c * torch.tanh(key[b, h, seen] @ query[b, h, i] * scale / c)
                output[b, h, i] = logits.softmax(0) @ value[b, h, seen]
    return output


def _inputs(length: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(4 * torch.randn(2, 3, n, 6, dtype=torch.float64) for n in (length, keys, keys))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", ["none", "causal", "bool", "float"])
def test_by_its_definition(masked: str, scale: float | None) -> None:
    query, key, value = _inputs()
    visible, options = torch.ones(2, 3, 5, 7, dtype=torch.bool), {}
    if masked == "causal":
        visible, options = visible.tril(), {"is_causal": True}
    elif masked != "none":
        visible = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)).gt(0.4).expand(2, 3, 5, 7).clone()
        visible[..., 0] = True
        added = torch.zeros(2, 3, 5, 7, dtype=torch.float64).masked_fill(~visible, -torch.inf)
        options = {"attn_mask": visible if masked == "bool" else added}
    output, weights = softcapped_attention(query, key, value, 2.5, scale=scale, **options)
    expected = _by_definition(query, key, value, 2.5, visible, 6**-0.5 if scale is None else scale)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights @ value, expected)
    assert bool((weights[~visible] == 0).all())


def test_a_far_cap_is_none() -> None:
    query, key, value = _inputs(8, 8)
    few, few_values = key[:, :1], value[:, :1]
    expected = F.scaled_dot_product_attention(query, few, few_values, is_causal=True, enable_gqa=True)
    output, _ = softcapped_attention(query, few, few_values, 1e9, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("masked", ["bool", "float"])
def test_a_query_that_sees_no_key_attends_to_nothing(masked: str) -> None:
    query, key, value = (each.requires_grad_() for each in _inputs())
    visible = torch.ones(5, 7, dtype=torch.bool)
    visible[2] = False
    added = torch.zeros(5, 7, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    output, _ = softcapped_attention(query, key, value, 2.0, visible if masked == "bool" else added)
    assert bool((output[:, :, 2] == 0).all())
    output.sum().backward()
    assert all(bool(each.grad.isfinite().all()) for each in (query, key, value))
    assert bool((query.grad[:, :, 2] == 0).all())


def test_gradient() -> None:
    query, key, value = (each[:1, :2, :3].requires_grad_() for each in _inputs())
    assert torch.autograd.gradcheck(lambda *qkv: softcapped_attention(*qkv, 1.5)[0], (query, key, value))


def test_dropout_keeps_the_mean() -> None:
    query, key, value = _inputs(400, 50)
    torch.manual_seed(1)
    _, dropped = softcapped_attention(query, key, value, 2.0, dropout_p=0.25)
    _, weights = softcapped_attention(query, key, value, 2.0)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
    assert float(kept.double().mean()) == pytest.approx(0.75, abs=0.01)  # 120,000 draws: 8 standard deviations


def test_half_precision_logits_are_float32() -> None:
    query, key, value = (each.bfloat16() for each in _inputs())
    output, _ = softcapped_attention(query, key, value, 50.0)
    expected, _ = softcapped_attention(query.double(), key.double(), value.double(), 50.0)
    assert output.dtype == torch.bfloat16
    # bfloat16 has 8 bits: of values up to 15 the rounding of the products alone is 0.06
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.3)
