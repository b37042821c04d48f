import math

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.models.forecast_transformer import Block, ForecastTransformer

X = torch.randn(5, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NORMS = ("pre", "post", "none")


def transformer(**options: object) -> ForecastTransformer:
    torch.manual_seed(1)
    return ForecastTransformer(10, 4, 3, **({"dim": 8, "num_heads": 2} | options)).double().eval()


def torchs_layer(block: Block) -> nn.TransformerEncoderLayer:
    """torch's encoder layer with the weights of a block."""
    dim, hidden = block.mlp.up.in_features, block.mlp.up.out_features
    options = {"activation": "gelu", "batch_first": True, "norm_first": not block.post_norm, "dtype": torch.float64}
    other = nn.TransformerEncoderLayer(dim, block.attention.num_heads, hidden, 0.0, **options).eval()
    layers = (block.attention.query, block.attention.key, block.attention.value)
    with torch.no_grad():
        other.self_attn.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        other.self_attn.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
    pairs = [(other.self_attn.out_proj, block.attention.out), (other.linear1, block.mlp.up)]
    pairs += [(other.linear2, block.mlp.down), (other.norm1, block.attention_norm), (other.norm2, block.mlp_norm)]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    return other


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_is_torchs_encoder_layer(norm: str) -> None:
    torch.manual_seed(2)
    block = Block(8, 2, 3, 0.0, norm).double()
    for each in (block.attention_norm, block.mlp_norm):
        nn.init.normal_(each.weight)
        nn.init.normal_(each.bias)
    other, ours = torchs_layer(block), torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    found, expected = block(ours), other(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for output in (found, expected):
        output.cos().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(block.mlp.up.weight.grad, other.linear1.weight.grad, rtol=1e-10, atol=1e-12)
    keys = other.self_attn.in_proj_weight.grad[8:16]
    torch.testing.assert_close(block.attention.key.weight.grad, keys, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("revin", [True, False])
def test_the_model_is_what_loops_compute(revin: bool, positions: str) -> None:
    """Around torch's layers, window by window and step by step."""
    model = transformer(revin=revin, positions=positions)
    state, layers = model.state_dict(), [torchs_layer(block) for block in model.blocks]
    for b, window in enumerate(X):
        level = window.mean(-1, keepdim=True) if revin else torch.zeros(3, 1, dtype=X.dtype)
        spread = ((window - level).square().mean(-1, keepdim=True) + 1e-5).sqrt() if revin else torch.ones_like(level)
        series = (window - level) / spread
        tokens = []
        for step in range(10):
            token = state["embedding.weight"] @ series[:, step] + state["embedding.bias"]
            for i in range(8):
                angle = step / 10_000 ** (i // 2 * 2 / 8)
                own = math.cos(angle) if i % 2 else math.sin(angle)
                token[i] += state["position"][step, i] if positions == "learned" else own
            tokens.append(token)
        x = torch.stack(tokens).unsqueeze(0)
        for layer in layers:
            x = layer(x)
        x = nn.functional.layer_norm(x[0], (8,), state["norm.weight"], state["norm.bias"])
        for c in range(3):
            steps = [state["readout.weight"][c] @ token + state["readout.bias"][c] for token in x]
            for h in range(4):
                head = sum(w * s for w, s in zip(state["head.weight"][h], steps, strict=True)) + state["head.bias"][h]
                # sinusoids are float32
                rounding = 1e-12 if positions == "learned" else 1e-5
                torch.testing.assert_close(
                    model(X)[b, c, h], head * spread[c, 0] + level[c, 0], rtol=rounding, atol=rounding
                )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_parameters(norm: str, positions: str) -> None:
    model = transformer(norm=norm, positions=positions, depth=3, mlp_ratio=2)
    block = 4 * (8 * 8 + 8) + (8 * 16 + 16) + (16 * 8 + 8)
    norms = {"pre": 3 * 2 + 1, "post": 3 * 2, "none": 0}[norm] * 2 * 8
    ends = (3 * 8 + 8) + (10 * 8 if positions == "learned" else 0) + (8 * 3 + 3) + (10 * 4 + 4)
    assert sum(p.numel() for p in model.parameters()) == 3 * block + norms + ends
    assert ("position" in model.state_dict()) == (positions == "learned")


def test_steps_have_an_order() -> None:
    model = transformer(revin=False)
    nn.init.constant_(model.head.weight, 0.1)  # which alone would not tell them apart
    assert not torch.allclose(model(X.flip(-1)), model(X))
    nn.init.zeros_(model.position)
    torch.testing.assert_close(model(X.flip(-1)), model(X), rtol=1e-11, atol=1e-12)


def test_dropout_is_for_training_alone() -> None:
    model = transformer(dropout=0.5)
    torch.testing.assert_close(model(X), transformer()(X), rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(X), model(X))


@pytest.mark.parametrize("norm", NORMS)
def test_every_head_is_seen(norm: str) -> None:
    model = transformer(norm=norm)
    with tt.observe(model) as seen:
        model(X)
    assert list(seen.heads) == ["blocks.0.attention", "blocks.1.attention"]
    for reading in seen.heads.values():
        assert reading.entropy.shape == (2,)
        assert ((reading.entropy > 0) & (reading.entropy <= math.log(10))).all()


def test_what_does_not_fit_is_refused() -> None:
    for x in (X[0], X[:, :2], X[..., :9], X.long()):
        with pytest.raises(ValueError, match=r"\(B, 3 channels, 10 steps of look-back\), got"):
            transformer()(x)
