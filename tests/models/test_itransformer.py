import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trimtab as tt
from trimtab.models.itransformer import ITransformer

X = torch.randn(5, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def itransformer(**options: object) -> ITransformer:
    torch.manual_seed(1)
    return ITransformer(10, 4, 3, **({"dim": 8, "num_heads": 2} | options)).double().eval()


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("revin", [True, False])
def test_tokens_are_channels(revin: bool, norm: str) -> None:
    model = itransformer(revin=revin, norm=norm)
    state = model.state_dict()
    found = model(X)
    for b, window in enumerate(X):
        level = window.mean(-1, keepdim=True) if revin else torch.zeros(3, 1, dtype=X.dtype)
        spread = ((window - level).square().mean(-1, keepdim=True) + 1e-5).sqrt() if revin else torch.ones_like(level)
        tokens = [state["embedding.weight"] @ series + state["embedding.bias"] for series in (window - level) / spread]
        x = torch.stack(tokens).unsqueeze(0)
        for block in model.blocks:  # which test_forecast_transformer.py compares with torch's
            x = block(x)
        for c, token in enumerate(x[0]):
            token = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()  # the last norm, as it starts
            expected = (state["head.weight"] @ token + state["head.bias"]) * spread[c] + level[c]
            torch.testing.assert_close(found[b, c], expected, rtol=1e-11, atol=1e-12)


@given(st.permutations(range(3)))
@settings(max_examples=6)
def test_the_order_of_channels_is_none(order: list[int]) -> None:
    model = itransformer()
    torch.testing.assert_close(model(X[:, order]), model(X)[:, order], rtol=1e-12, atol=1e-12)


def test_channels_see_each_other() -> None:
    changed = X.clone()
    changed[:, 0] = changed[:, 0].flip(-1)
    model = itransformer()
    assert not torch.allclose(model(changed)[:, 1], model(X)[:, 1], rtol=1e-6, atol=1e-6)
    nn.init.zeros_(model.blocks[0].attention.out.weight)
    nn.init.zeros_(model.blocks[1].attention.out.weight)
    torch.testing.assert_close(model(changed)[:, 1], model(X)[:, 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_parameters(norm: str) -> None:
    model = itransformer(norm=norm, depth=3, mlp_ratio=2)
    block = 4 * (8 * 8 + 8) + (8 * 16 + 16) + (16 * 8 + 8)
    norms = 0 if norm == "none" else (3 * 2 + 1) * 2 * 8
    expected = (10 * 8 + 8) + 3 * block + norms + (8 * 4 + 4)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_gradients_are_those_of_the_function() -> None:
    model, x = itransformer(depth=1), X[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(model, (x,))


def test_dropout_is_for_training_alone() -> None:
    model = itransformer(dropout=0.5)
    torch.testing.assert_close(model(X), itransformer()(X), rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(X), model(X))


def test_every_head_is_seen() -> None:
    model = itransformer()
    with tt.observe(model) as seen:
        model(X)
    assert list(seen.heads) == ["blocks.0.attention", "blocks.1.attention"]
    for reading in seen.heads.values():  # over channels
        assert reading.entropy.shape == (2,)
        assert ((reading.entropy > 0) & (reading.entropy <= math.log(3))).all()


def test_what_does_not_fit_is_refused() -> None:
    for x in (X[0], X[:, :2], X[..., :9], X.long()):
        with pytest.raises(ValueError, match=r"\(B, 3 channels, 10 steps of look-back\), got"):
            itransformer()(x)
