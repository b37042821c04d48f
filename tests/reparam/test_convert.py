"""Conversion and folding: the function stays, and so do weights, optimisers, sharing and the random state."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import sigma_gamma

MakeMixed = Callable[..., tuple[Any, Tensor]]


RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def train_some_steps(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_the_function_stays_through_conversion_training_and_folding(mixed: MakeMixed, dtype: torch.dtype) -> None:
    model, x = mixed(dtype)
    keys, y = list(model.state_dict()), model(x)
    assert tt.reparametrize_(model) is model
    assert relative(model(x), y) < RELATIVE[dtype]
    train_some_steps(model, x)
    trained = model(x)
    assert relative(trained, y) > 1e-2
    assert tt.fold_(model) is model
    assert relative(model(x), trained) < RELATIVE[dtype]
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == [type(m) for m in mixed(seed=1)[0].modules()]
    fresh = mixed(dtype, seed=1)[0]
    fresh.load_state_dict(model.state_dict())
    assert relative(fresh(x), trained) < RELATIVE[dtype]


@pytest.mark.parametrize("gamma_init", ["one", 1, 2.5])
def test_gamma_may_start_elsewhere(mixed: MakeMixed, gamma_init: str | float) -> None:
    model, _ = mixed()
    tt.reparametrize_(model, tt.SigmaReparam(gamma_init=gamma_init))
    value = 1.0 if gamma_init == "one" else float(gamma_init)
    for layer in (model.patch, model.head, model.attention.out_proj):
        norm = torch.linalg.matrix_norm(tt.effective_weight(layer).flatten(1), 2)
        assert float(norm.detach()) == pytest.approx(value, rel=1e-5)
        assert layer.gamma.shape == (1,)


def test_the_weight_stays_the_same_parameter_and_the_optimiser_its_state(mixed: MakeMixed) -> None:
    model, x = mixed()
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    tt.reparametrize_(model)
    for name, p in weights.items():
        assert dict(model.named_parameters())[name] is p
        assert "exp_avg" in optimizer.state[p]


def test_a_root_layer_is_converted_and_folded_in_place() -> None:
    layer = nn.Linear(3, 2)
    assert tt.reparametrize_(layer) is layer
    assert "gamma" in dict(layer.named_parameters())
    assert isinstance(layer, nn.Linear)
    assert type(tt.fold_(layer)) is nn.Linear


def test_a_frozen_weight_has_a_frozen_gamma() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    tt.reparametrize_(layer)
    assert not layer.gamma.requires_grad
    layer(torch.randn(1, 3)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_a_filter_picks_by_layer_and_name_and_the_rest_may_follow(mixed: MakeMixed) -> None:
    model, x = mixed()
    seen: list[str] = []

    def only_head(module: nn.Module, name: str) -> bool:
        seen.append(name)
        return name == "head"

    y = model(x)
    tt.reparametrize_(model, filter_fn=only_head)
    assert list(sigma_gamma(model)) == ["head.weight"]
    assert set(seen) == {
        *("patch", "grouped", "volume", "attention", "attention.out_proj", "separate", "separate.out_proj", "head")
    }
    tt.reparametrize_(model, filter_fn=lambda module, name: name != "head")
    assert relative(model(x), y) < 1e-5
    assert len(sigma_gamma(model)) == 10


def test_weights_shared_with_an_embedding_are_left_alone() -> None:
    model = nn.Sequential(OrderedDict(embed=nn.Embedding(7, 4), body=nn.Linear(4, 4), head=nn.Linear(4, 7, bias=False)))
    model.head.weight = model.embed.weight
    tt.reparametrize_(model)
    assert list(sigma_gamma(model)) == ["body.weight"]
    assert model.head.weight is model.embed.weight
    text = tt.describe(model)
    assert "head.weight" in text
    assert "shares its weight with embed.weight" in text
    with pytest.raises(tt.ConversionError, match=r"head\.weight with embed\.weight"):
        tt.reparametrize_(model, filter_fn=lambda m, name: name == "head")


def test_layers_that_share_a_weight_share_gamma_and_vectors_and_fold_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    x = torch.randn(3, 4, dtype=torch.float64)
    y = model(x)
    tt.reparametrize_(model, tt.SigmaReparam("spectral"))
    assert model[0].gamma is model[2].gamma
    assert model[0].sigma_u is model[2].sigma_u
    with torch.no_grad():
        model[0].gamma.mul_(1.5)
    scaled = model(x)
    assert relative(scaled, y) > 1e-2
    twin = copy.deepcopy(model)
    assert twin[0].gamma is twin[2].gamma
    tt.fold_(model)
    assert model[0].weight is model[2].weight
    assert relative(model(x), scaled) < 1e-12


def test_effective_weight_names_what_a_layer_uses(mixed: MakeMixed) -> None:
    model, _ = mixed()
    assert tt.effective_weight(model.head) is model.head.weight
    tt.reparametrize_(model)
    with torch.no_grad():
        model.head.gamma.fill_(3.0)
    assert float(torch.linalg.matrix_norm(tt.effective_weight(model.head), 2).detach()) == pytest.approx(3, rel=1e-5)
    assert tt.effective_weight(model.attention).shape == (48, 16)
    with pytest.raises(ValueError, match="3 weights"):
        tt.effective_weight(model.separate)
    assert tt.effective_weight(model.separate, "v_proj_weight").shape == (16, 8)
    with pytest.raises(ValueError, match="no weight 'kernel'"):
        tt.effective_weight(model.head, "kernel")
    with pytest.raises(ValueError, match="ReLU has no weight of its own"):
        tt.effective_weight(nn.ReLU())


def test_the_random_state_is_not_used(mixed: MakeMixed) -> None:
    model, _ = mixed()
    state = torch.get_rng_state()
    tt.reparametrize_(model)
    assert torch.equal(state, torch.get_rng_state())


def test_a_wrong_input_shape_is_reported_by_the_layer() -> None:
    layer = tt.reparametrize_(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="4"):
        layer(torch.randn(2, 5))
    conv = tt.reparametrize_(nn.Conv2d(3, 4, 2))
    with pytest.raises(ValueError, match=r"expected input of shape \(B, C, 2 spatial sizes\)"):
        conv(torch.randn(5))


def gammas_(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.mul_(factor)


def test_tied_layers_stay_in_step_after_a_cast() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    tt.reparametrize_(model).double()  # torch moves buffers module by module, which unties them
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(16, 8, dtype=torch.float64)
    for _ in range(10):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert torch.equal(model[0].sigma_u, model[2].sigma_u)
    y = model(x)
    tt.fold_(model)
    assert relative(model(x), y) < 1e-12


def test_two_parameters_in_one_memory_are_one_weight() -> None:
    embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight.data = embed.weight.data
    with pytest.raises(tt.ConversionError, match="shared weights are left alone"):
        tt.reparametrize_(nn.Sequential(embed, head))
    twins = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    twins[1].weight.data = twins[0].weight.data
    tt.reparametrize_(twins)
    gammas_(nn.Sequential(twins[0]), 1.5)
    x = torch.randn(3, 4, dtype=torch.float64)
    y = twins(x)
    assert relative(tt.fold_(twins)(x), y) < 1e-12


def test_conversion_in_inference_mode_can_be_trained() -> None:
    layer = nn.Linear(4, 3)
    with torch.inference_mode():
        tt.reparametrize_(layer)
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.gamma.grad is not None


def test_numbers_of_numpy_are_numbers_and_too_large_ones_are_refused() -> None:
    layer = tt.reparametrize_(nn.Linear(2, 2), tt.SigmaReparam(np.float32(2)))
    assert float(layer.gamma.detach()) == 2
    with pytest.raises(ValueError, match="that float32 can hold"):
        tt.SigmaReparam(1e39)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (16, 3), (3, 512), (300, 40), (512, 2048), (4096, 1024)], ids=str)
@pytest.mark.parametrize("rank", ["full", "one"])
def test_sigma_after_conversion_is_the_spectral_norm(shape: tuple[int, int], rank: str) -> None:
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        if rank == "one":
            column, row = (torch.randn(n, generator=generator) for n in shape)
            layer.weight.copy_(torch.outer(column, row))
            expected = (column.norm() * row.norm()).item()
        else:
            layer.weight.normal_(generator=generator)
            expected = torch.linalg.matrix_norm(layer.weight, 2).item()
    sigma, gamma = sigma_gamma(tt.reparametrize_(layer))["weight"]
    assert sigma.item() == pytest.approx(expected, rel=1e-4)
    assert gamma.item() == pytest.approx(expected, rel=1e-4)


def test_effective_weight_reads_the_tensors_of_a_functional_call() -> None:
    class Reader(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self) -> torch.Tensor:
            return tt.effective_weight(self.layer)

    reader, weight = Reader(), torch.eye(3)
    assert torch.func.functional_call(reader, {"layer.weight": weight}, ()) is weight
