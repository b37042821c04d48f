"""The config of all models that forecast, and every stabilizer, sigma-Reparam and Watch on each of them."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

import trimtab as tt
from trimtab.errors import ConversionError, RecipeError
from trimtab.models import ForecastModelConfig, make_forecast_model
from trimtab.models.forecasting import Kind
from trimtab.reparam.layers import Reparametrized
from trimtab.stabilizers import STABILIZERS, fold_, stabilize_
from trimtab.stabilizers.apply import changes_models
from trimtab.stabilizers.registry import parse

CHANGING = [
    name
    for name, cls in STABILIZERS.items()
    if cls.__module__.startswith("trimtab.") and name != "none" and changes_models(*parse(name))
]
OF_BLOCKS = ("deepnorm", "layer-scale", "rezero")
KINDS = get_args(Kind)
X = torch.randn(40, 5, 24, generator=torch.Generator().manual_seed(0))


def config(kind: str = "samformer", **changes: object) -> ForecastModelConfig:
    sizes = {"lookback": 24, "horizon": 6, "channels": 5, "dim": 8, "num_heads": 1 if kind == "samformer" else 2}
    return ForecastModelConfig(kind, **(sizes | changes))


def model(kind: str = "samformer", **changes: object) -> torch.nn.Module:
    torch.manual_seed(1)
    return make_forecast_model(config(kind, **changes))


def test_as_it_stands_it_is_the_published_samformer() -> None:
    made = make_forecast_model(replace(ForecastModelConfig(), channels=7))
    assert sum(p.numel() for p in made.parameters()) == 82_576
    assert made(torch.randn(2, 7, 512)).shape == (2, 7, 96)


@pytest.mark.parametrize("revin", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_in_forecasts_out(kind: str, revin: bool) -> None:
    made = model(kind, revin=revin, affine=revin)
    forecast = made(X)
    assert forecast.shape == (40, 5, 6)
    forecast.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())
    again = dict(model(kind, revin=revin, affine=revin).named_parameters())  # the same seed draws the same weights
    torch.testing.assert_close(dict(made.named_parameters()), again, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_forecasts_follow_the_level_of_the_window(kind: str) -> None:
    made = model(kind).double().eval()
    torch.testing.assert_close(made(X.double() + 100), made(X.double()) + 100, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind: str) -> None:
    """The next steps of sines, of any phase; their own mean leaves an error of 0.5."""
    made = model(kind, revin=False)
    generator = torch.Generator().manual_seed(3)
    phase = torch.rand(128, 5, 1, generator=generator) * 2 * torch.pi
    series = (phase + torch.arange(30) * 2 * torch.pi / 12).sin()
    x, y = series[..., :24], series[..., 24:]
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (made(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("form", ["factored", "full"])
def test_options_reach_samformer(form: str) -> None:
    made = model(form=form, num_heads=2, frozen_attention=True)
    assert (made.attention.num_heads, made.attention.query.out_features) == (2, 8)
    assert made.attention.value.out_features == (8 if form == "factored" else 24)
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_options_reach_the_baselines() -> None:
    def count(kind: str, **changes: object) -> int:
        return sum(p.numel() for p in model(kind, **changes).parameters())

    for kind in ("transformer", "itransformer"):
        assert len(model(kind, depth=3).blocks) == 3
        assert model(kind, mlp_ratio=2).blocks[0].mlp.up.out_features == 16
        assert model(kind, dropout=0.25).blocks[0].drop.p == 0.25
        assert [model(kind, norm=norm).blocks[0].post_norm for norm in ("pre", "post")] == [False, True]
        assert model(kind).blocks[0].post_norm == (kind == "itransformer")
        assert count(kind) - count(kind, norm="none") == (2 * 2 + 1) * 2 * 8
    assert count("transformer") - count("transformer", positions="sinusoidal") == 24 * 8
    assert isinstance(model("tsmixer", window_norm="layer").blocks[0].time_norm, torch.nn.LayerNorm)
    assert model("tsmixer", dropout=0.25).blocks[0].drop.p == 0.25
    assert model("tsmixer", dim=3, num_heads=1, depth=4).blocks[3].up.out_features == 3
    assert count("dlinear", individual=True) == 5 * count("dlinear")
    assert model("dlinear", kernel=7).kernel == 7


def test_starts_of_weights() -> None:
    made = model("itransformer", dim=64, init="normal", init_std=0.1)
    for module in made.modules():
        if isinstance(module, torch.nn.Linear):
            assert not module.bias.any()
            # standard errors of 1 / sqrt(2 n), n being 384 of the smallest
            assert module.weight.std().item() == pytest.approx(0.1, rel=0.15)
    assert model("dlinear").trend[0].bias.any()  # torch's own start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lstm"}, "kind must be one of samformer, .*; got 'lstm'"),
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"form": "half"}, "form must be one of factored, full; got 'half'"),
        ({"norm": "batch"}, "norm must be one of pre, post, none, or None; got 'batch'"),
        ({"window_norm": "post"}, "window_norm must be one of batch, layer; got 'post'"),
        ({"positions": "rotary"}, "positions must be one of learned, sinusoidal"),
        ({"init": "zeros"}, "init must be one of torch, normal"),
        ({"init_std": 0.0}, "init_std must be a positive number"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"kernel": 4}, "kernel must be odd, .*; got 4"),
        ({"dim": 6, "num_heads": 4}, "dim 6 is not a multiple of num_heads 4"),
        ({"form": "full", "dim": 10, "num_heads": 5}, "lookback 24 is not a multiple of num_heads 5"),
        ({"kind": "transformer", "positions": "sinusoidal", "dim": 5, "num_heads": 1}, "dim must be even, .*; got 5"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(config(), **changes)


def test_a_model_needs_its_channels() -> None:
    with pytest.raises(RecipeError, match="needs its channels"):
        make_forecast_model(ForecastModelConfig())


@pytest.mark.parametrize("form", ["factored", "full"])
@pytest.mark.parametrize("name", CHANGING)
def test_stabilizers_on_samformer(name: str, form: str) -> None:
    made = model(form=form)
    if name in OF_BLOCKS:  # it has one branch and no MLP
        with pytest.raises(ConversionError, match="found no residual branches"):
            stabilize_(made, name)
        return
    stabilize_(made, name)
    made(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["transformer", "itransformer"])
@pytest.mark.parametrize("name", CHANGING)
def test_stabilizers_on_transformers(name: str, kind: str) -> None:
    made = model(kind, norm="post" if name == "deepnorm" else "pre")
    stabilize_(made, name)
    made(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("spec", ["sigma", "sigma:gamma_init=one", "sigma+qk-norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_sigma_reaches_every_layer_and_folds(kind: str, spec: str) -> None:
    if "qk-norm" in spec and kind in ("tsmixer", "dlinear"):
        with pytest.raises(ConversionError, match="finds no attention"):
            stabilize_(model(kind), spec)
        return
    made = model(kind).double().eval()
    before, linears = made(X.double()), [m for m in made.modules() if isinstance(m, torch.nn.Linear)]
    stabilize_(made, spec)
    assert all(isinstance(linear, Reparametrized) for linear in linears)
    stabilized = made(X.double())
    assert torch.allclose(stabilized, before, rtol=1e-9, atol=1e-9) == (spec == "sigma")
    fold_(made)
    assert not any(isinstance(m, Reparametrized) for m in made.modules())
    torch.testing.assert_close(made(X.double()), stabilized, rtol=1e-9, atol=1e-9)


def test_a_soft_cap_holds_the_logits() -> None:
    made = model(form="full")
    torch.nn.init.normal_(made.attention.query.weight, std=5.0)
    with tt.observe(made) as seen:
        made(X)
    hot = seen.heads["attention"].entropy.item()
    stabilize_(made, "softcap:attention=0.1:logits=none")
    with tt.observe(made) as seen:
        made(X)
    assert hot < 1.0
    assert seen.heads["attention"].entropy.item() > 1.59  # at most ±0.1 apart, 5 keys come near to log 5 = 1.609
