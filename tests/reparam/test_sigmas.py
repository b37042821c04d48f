"""The sigmas of a converted model, and how far they are from the truth."""

import math

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.reparam import sigma_gamma, stable_ranks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 200), nn.Linear(200, 150)).double()
    return tt.reparametrize_(layers, tt.SigmaReparam(vectors=1, blocks=lambda module, name: 3 if name == "0" else None))


def test_right_after_conversion_there_is_none() -> None:
    errors = tt.sigma_error(net())
    assert {name: tuple(error.shape) for name, error in errors.items()} == {
        "0.weight": (3,),
        "1.weight": (1,),
        "2.weight": (1,),
    }
    for error in errors.values():
        torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-9)


def test_it_is_true_sigma_over_the_one_in_use_minus_one() -> None:
    model = net()
    with torch.no_grad():
        for layer in model:
            layer.weight.add_(torch.randn(layer.weight.shape, dtype=torch.float64) * 0.3)
    in_use, errors = sigma_gamma(model), tt.sigma_error(model)
    for index, layer in enumerate(model):
        name = f"{index}.weight"
        blocks = layer.weight.detach().split(3 if index == 0 else len(layer.weight))
        true = torch.stack([torch.linalg.matrix_norm(block, 2) for block in blocks])
        torch.testing.assert_close(errors[name], true / in_use[name][0] - 1, rtol=1e-6, atol=1e-9)
        assert (errors[name] > 0.01).all()
    tt.refresh_(model, exact=True)
    assert max(float(error.abs().max()) for error in tt.sigma_error(model).values()) < 1e-9


def test_a_broken_weight_shows_nan_and_plain_models_show_nothing() -> None:
    model = net()
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    errors = tt.sigma_error(model)
    assert errors["1.weight"].isnan().all()
    assert not errors["2.weight"].isnan().any()
    assert tt.sigma_error(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_stable_ranks_of_every_block(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    in_use = {name: sigma for name, (sigma, _) in sigma_gamma(model).items()}
    ranks = stable_ranks(model, in_use)
    assert list(ranks) == list(in_use)
    for index, layer in enumerate(model):
        sigma = in_use[f"{index}.weight"]
        squares = layer.weight.detach().double().square().sum(1).view(len(sigma), -1).sum(1)
        # bfloat16 weights have a sigma in float32, and so are the sums: up to 200 squares, each rounded to 6e-8
        torch.testing.assert_close(ranks[f"{index}.weight"].double(), squares / sigma.double() ** 2, rtol=2e-5, atol=0)
    with torch.no_grad():
        model[1].weight[0, 0] = math.inf
        model[2].weight.zero_()
    broken = stable_ranks(model, {name: sigma for name, (sigma, _) in sigma_gamma(model).items()})
    assert broken["1.weight"].isnan().all()
    assert broken["2.weight"].isnan().all()
    assert broken["0.weight"].isfinite().all()


@pytest.mark.parametrize("vectors", [1, 4])
def test_more_vectors_follow_a_turning_weight_more_closely(vectors: int) -> None:
    """Weights whose leading direction is overtaken by another: one vector is late, four are not."""
    layer = nn.Linear(8, 8, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.1, 0.1, 0.1])))
    tt.reparametrize_(layer, tt.SigmaReparam(vectors=vectors))
    with torch.no_grad():
        layer.weight[1, 1] = 9.0
    tt.refresh_(layer)
    error = float(tt.sigma_error(layer)["weight"])
    assert error == pytest.approx(2.0 if vectors == 1 else 0.0, abs=1e-6)
