import math

import pytest
import torch

import trimtab as tt
from trimtab.attention import ChannelAttention, attention_entropy

FORMS = ("factored", "full")
X = torch.randn(3, 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def attention(**options: object) -> ChannelAttention:
    torch.manual_seed(1)
    return ChannelAttention(12, **({"dim": 6} | options)).double()


def reference(module: ChannelAttention, x: torch.Tensor) -> torch.Tensor:
    """By loops over windows, heads and channels."""

    def mapped(layer: torch.nn.Linear, series: torch.Tensor) -> torch.Tensor:
        bias = 0 if layer.bias is None else layer.bias
        return torch.stack([(row * series).sum() for row in layer.weight]) + bias

    result = torch.empty_like(x)
    for b, window in enumerate(x):
        query, key, value = (
            [mapped(layer, series).chunk(module.num_heads) for series in window]
            for layer in (module.query, module.key, module.value)
        )
        for c in range(len(window)):
            mixed = []
            for head in range(module.num_heads):
                width = len(query[c][head])
                scores = [((query[c][head] * other[head]).sum() / math.sqrt(width)).exp() for other in key]
                mixed.append(sum(s / sum(scores) * other[head] for s, other in zip(scores, value, strict=True)))
            row = torch.cat(mixed)
            result[b, c] = mapped(module.out, row) if isinstance(module.out, torch.nn.Linear) else row
    return result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_what_loops_compute(form: str, num_heads: int, bias: bool) -> None:
    module = attention(form=form, num_heads=num_heads, bias=bias)
    torch.testing.assert_close(module(X), reference(module, X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_function(form: str) -> None:
    module, x = attention(form=form), X[:1].clone().requires_grad_()
    names, values = zip(*module.named_parameters(), strict=True)

    def function(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(function, (x, *values))


def test_at_full_width_it_is_torchs_multihead_attention() -> None:
    module = attention(dim=12, num_heads=3)
    other = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    layers = (module.query, module.key, module.value)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        other.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
    other.out_proj.load_state_dict(module.out.state_dict())
    torch.testing.assert_close(module(X), other(X, X, X)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_parameters(num_heads: int) -> None:
    # query, key and value of L D + D, out of D L + L; in the full form a value of L L + L and no out
    count = {form: sum(p.numel() for p in attention(form=form, num_heads=num_heads).parameters()) for form in FORMS}
    assert count == {"factored": 3 * (12 * 6 + 6) + 6 * 12 + 12, "full": 2 * (12 * 6 + 6) + 12 * 12 + 12}


@pytest.mark.parametrize("num_heads", [1, 2])
def test_given_values_are_mixed_in_place_of_its_own(num_heads: int) -> None:
    module = attention(form="full", num_heads=num_heads)
    torch.testing.assert_close(module(X, module.value(X)), module(X), rtol=0, atol=0)
    ones = torch.ones(3, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(module(X, ones), ones)  # weights sum to one
    assert attention(num_heads=num_heads)(X, ones).shape == (3, 4, 2)  # without `out`


@pytest.mark.parametrize("form", FORMS)
def test_its_entropy_is_seen(form: str) -> None:
    module = attention(form=form, num_heads=2)
    model = torch.nn.Sequential(module)
    with tt.observe(model) as seen:
        model(X)
    query, key = (layer(X).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (module.query, module.key))
    expected = attention_entropy(query, key).mean(dim=(0, 2))
    torch.testing.assert_close(seen.heads["0"].entropy.double(), expected, rtol=1e-5, atol=1e-6)
    torch.nn.init.zeros_(module.query.weight)
    torch.nn.init.zeros_(module.query.bias)
    with tt.observe(model) as seen:
        model(X)
    torch.testing.assert_close(seen.heads["0"].entropy, torch.full((2,), math.log(4)), check_dtype=False)


def test_what_does_not_fit_is_refused() -> None:
    for options in ({"num_heads": 4}, {"num_heads": 0}, {"dim": 5, "num_heads": 5, "form": "full"}):
        with pytest.raises(ValueError, match="multiple of num_heads"):
            attention(**options)
    with pytest.raises(ValueError, match="factored or full; got 'half'"):
        attention(form="half")
    module = attention(num_heads=2)
    for x in (X[0], X[..., :11]):
        with pytest.raises(ValueError, match=r"\(B, C, 12 steps of look-back\), got"):
            module(x)
    for values in (X[:, :3], X[..., :5]):
        with pytest.raises(ValueError, match=r"expected values of shape \(3, 4\) and a multiple of 2"):
            module(X, values)
