"""QK-norm: queries and keys of every head are normalised, whatever the order in which a model holds them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_calls import KINDS, calls_of, images, language_model, tokens, vit
from torch import Tensor, nn

from trimtab.errors import ConversionError
from trimtab.stabilizers import fold_, stabilize_
from trimtab.stabilizers.qk_norm import QKNorm


def _rms_normalized(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_every_layout_are_normalized_and_values_are_not(kind: str) -> None:
    model = language_model(kind)
    (before,) = calls_of(lambda: model(tokens()))
    # an RMS norm without scale commutes with rotary embeddings, which come after it
    QKNorm(norm="rms", affine=False).apply_(model)
    (after,) = calls_of(lambda: model(tokens()))
    torch.testing.assert_close(after.query, _rms_normalized(before.query))
    torch.testing.assert_close(after.key, _rms_normalized(before.key))
    torch.testing.assert_close(after.value, before.value, rtol=0, atol=0)


def test_layer_norm_by_its_definition() -> None:
    model = vit()
    (before,) = calls_of(lambda: model(images()))
    stabilize_(model, "qk-norm")
    attention = model.blocks[0].attention
    with torch.no_grad():
        attention.query.query_norm.weight.copy_(torch.linspace(0.5, 2, 6))
    (after,) = calls_of(lambda: model(images()))
    for x, y, scale in ((before.query, after.query, torch.linspace(0.5, 2, 6)), (before.key, after.key, torch.ones(6))):
        centred = x - x.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
        torch.testing.assert_close(y, expected)


def test_the_size_of_the_weights_does_not_count() -> None:
    model = vit(depth=2)
    stabilize_(model, "qk-norm")
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query.weight *= 100  # so that the norm's epsilon is nothing beside the variance
        before = model(images())
        for block in model.blocks:
            block.attention.query.weight *= 7
        torch.testing.assert_close(model(images()), before, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
def test_multihead_attention_by_its_definition(packed: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    sizes = {} if packed else {"kdim": 10, "vdim": 14}
    attention = nn.MultiheadAttention(12, 3, batch_first=True, **sizes).double()
    query, key, value = (torch.randn(2, n, d).double() for n, d in ((4, 12), (5, 12), (5, 12)))
    if not packed:
        key, value = torch.randn(2, 5, 10).double(), torch.randn(2, 5, 14).double()
    nn.init.normal_(attention.in_proj_bias)
    plain = (
        attention.in_proj_weight.chunk(3)
        if packed
        else (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    )
    biases = attention.in_proj_bias.chunk(3)
    stabilize_(attention, "qk-norm")
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (3, 4)).transpose(1, 2)
        for x, w, b in zip((query, key, value), plain, biases, strict=True)
    )
    q, k = (F.layer_norm(each, (4,), eps=1e-6) for each in (q, k))
    weights = (q @ k.mT / 2).softmax(-1)
    expected = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    output, returned = attention(query, key, value, need_weights=need_weights)
    torch.testing.assert_close(output, expected)
    if need_weights:
        torch.testing.assert_close(returned, weights.mean(1))


def _attention() -> nn.Module:
    return nn.MultiheadAttention(24, 4, batch_first=True).double()


@pytest.mark.parametrize("model", [vit, _attention])
def test_before_or_after_sigma_is_the_same_and_it_outlives_folding(model: Callable[[], nn.Module]) -> None:
    first, second = model(), model()
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 5, 24).double()

    def run(m: nn.Module) -> Tensor:
        return m(x, x, x)[0] if isinstance(m, nn.MultiheadAttention) else m(images())

    stabilize_(stabilize_(first, "sigma"), "qk-norm")
    stabilize_(stabilize_(second, "qk-norm"), "sigma")
    torch.testing.assert_close(run(first), run(second), rtol=0, atol=0)
    expected = run(first)
    fold_(first)
    torch.testing.assert_close(run(first), expected)
    assert any(name.endswith("query_norm.weight") for name, _ in first.named_parameters())
    assert not any("gamma" in name for name, _ in first.named_parameters())


def test_a_model_that_has_it_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 6,
    }
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=17, num_key_value_heads=2, **sizes))
    for spec in ("qk-norm", "qk-clip"):
        with pytest.raises(ConversionError, match=r"QK-norm already \(q_norm\)"):
            stabilize_(model, spec)
    with pytest.raises(ConversionError, match="finds no attention"):
        stabilize_(nn.Linear(4, 4), "qk-norm")


def test_half_precision_stays() -> None:
    model = vit().bfloat16()
    stabilize_(model, "qk-norm")
    (call,) = calls_of(lambda: model(images().bfloat16()))
    assert call.query.dtype == call.key.dtype == torch.bfloat16
    model = vit().float()
    stabilize_(model, "qk-norm")
    with torch.autocast("cpu", torch.bfloat16):
        (call,) = calls_of(lambda: model(images().float()))
    assert call.query.dtype == call.value.dtype == torch.bfloat16
