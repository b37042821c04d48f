"""The soft cap: no logit beyond it, on every kind of model, and seen as it is."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_calls import KINDS, calls_of, images, language_model, tokens, vit
from torch import Tensor, nn

import trimtab as tt
from trimtab.attention import attention_stats
from trimtab.errors import ConversionError, RecipeError
from trimtab.stabilizers import parse, stabilize_


@pytest.mark.parametrize("kind", [*KINDS, "vit"])
def test_watched_logits_are_the_capped_ones(kind: str) -> None:
    model = vit() if kind == "vit" else language_model(kind)
    inputs = images() if kind == "vit" else tokens()
    (plain,) = calls_of(lambda: model(inputs))
    assert float(plain.max_logits.max()) > 2.5  # or there would be nothing to cap
    stabilize_(model, "softcap:attention=2:logits=none")
    with tt.observe(model) as seen:
        model(inputs)
    (stats,) = seen.heads.values()
    expected = 2 * torch.tanh(plain.max_logits / 2)
    torch.testing.assert_close(stats.max_logit, expected, check_dtype=False, rtol=1e-5, atol=1e-5)
    options = {name: plain.options.get(name) for name in ("attn_mask", "scale")}
    entropy = attention_stats(
        plain.query, plain.key, is_causal=bool(plain.options.get("is_causal")), softcap=2.0, **options
    ).entropy
    torch.testing.assert_close(stats.entropy, entropy.mean((0, 2)), rtol=1e-5, atol=1e-5)


def test_the_output_is_that_of_capped_attention() -> None:
    model = vit()
    (call,) = calls_of(lambda: model(images()))
    attention = model.blocks[0].attention
    mixed: list[Tensor] = []
    attention.out.register_forward_pre_hook(lambda _, args: mixed.append(args[0]))
    stabilize_(model, "softcap:attention=3:logits=none")
    model(images())
    logits = 3 * torch.tanh(call.query @ call.key.mT / math.sqrt(6) / 3)
    expected = (logits.softmax(-1) @ call.value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed[0], expected)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
def test_multihead_attention_by_its_definition(need_weights: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=True).double()
    x = 5 * torch.randn(2, 4, 12).double()
    q, k, v = (
        part.unflatten(-1, (3, 4)).transpose(1, 2) for part in F.linear(x, attention.in_proj_weight).chunk(3, -1)
    )
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    logits = (0.5 * torch.tanh(q @ k.mT / 2 / 0.5)).masked_fill(hidden, -torch.inf)
    expected = attention.out_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    stabilize_(attention, "softcap:attention=0.5:logits=none")
    with tt.observe(attention) as seen:
        output, weights = attention(x, x, x, attn_mask=hidden, need_weights=need_weights)
    torch.testing.assert_close(output, expected)
    (stats,) = seen.heads.values()
    torch.testing.assert_close(stats.max_logit, logits.amax((0, 2, 3)), check_dtype=False)
    if need_weights:
        torch.testing.assert_close(weights, logits.softmax(-1).mean(1))


def test_final_logits() -> None:
    model = vit()
    plain = model(images())
    stabilize_(model, "softcap:attention=none:logits=1.5")
    capped = model(images())
    torch.testing.assert_close(capped, 1.5 * torch.tanh(plain / 1.5))
    (slope,) = torch.autograd.grad(capped.sum(), model.head.bias)
    torch.testing.assert_close(slope, (1 - torch.tanh(plain / 1.5) ** 2).sum(0))


def test_the_head_can_be_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ConversionError, match="softcap:head="):
        stabilize_(model, "softcap:attention=none")
    with pytest.raises(ConversionError, match="no module 'seven'"):
        stabilize_(model, "softcap:attention=none:head=seven")
    stabilize_(model, "softcap:attention=none:logits=0.1:head=2")
    assert float(model(torch.randn(9, 4)).detach().abs().max()) <= 0.1


def test_models_that_cannot_be_capped_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 6,
    }
    config = transformers.Gemma2Config(vocab_size=17, num_key_value_heads=2, **sizes)
    for spec in ("softcap", "qk-clip"):
        with pytest.raises(ConversionError, match=r"self_attn has a soft cap already \(attn_logit_softcapping\)"):
            stabilize_(transformers.Gemma2ForCausalLM(config), spec)
    with pytest.raises(ConversionError, match="final_logit_softcapping"):
        stabilize_(transformers.Gemma2ForCausalLM(config), "softcap:attention=none")
    model = language_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ConversionError, match="attn_implementation='eager'"):
        stabilize_(model, "softcap")
    with pytest.raises(ConversionError, match="without scaled_dot_product_attention"):
        stabilize_(_ByHand(), "softcap:logits=none")


class _ByHand(nn.Module):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) @ self.key(x).mT).softmax(-1) @ x


def test_attention_that_takes_another_way_is_an_error() -> None:
    model = language_model("llama")
    stabilize_(model, "softcap")
    model(tokens())
    model.set_attn_implementation("eager")
    with pytest.raises(ConversionError, match="no soft cap was applied"):
        model(tokens())


@pytest.mark.parametrize("spec", ["softcap:attention=0", "softcap:logits=-1", "softcap:attention=none:logits=none"])
def test_options_out_of_range(spec: str) -> None:
    with pytest.raises(RecipeError, match="softcap"):
        parse(spec)
