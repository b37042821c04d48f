"""sigma, init-scale, spectral-norm and weight-norm: what their options do to the weights in use."""

import copy
from collections.abc import Iterator

import pytest
import torch
from stabilizer_case import small, step_
from torch import Tensor, nn

import trimtab as tt
from trimtab.errors import ConversionError, RecipeError
from trimtab.reparam import sigma_gamma
from trimtab.stabilizers import fold_, parse, stabilize_


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weight in use of every Linear and convolution, as a matrix, by the layer's name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, tt.effective_weight(module).detach().flatten(1)


def norms(model: nn.Module) -> dict[str, float]:
    return {name: float(torch.linalg.matrix_norm(weight, 2)) for name, weight in matrices(model)}


@pytest.mark.parametrize("spec", ["sigma:gamma_init=one", "init-scale", "spectral-norm"])
def test_the_three_start_as_one_function_with_spectral_norm_one(spec: str) -> None:
    example, reference = small("vit"), small("vit")
    stabilize_(example.model, spec)
    assert norms(example.model) == pytest.approx(dict.fromkeys(norms(example.model), 1.0))
    with torch.no_grad():
        for module in reference.model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight /= torch.linalg.matrix_norm(module.weight.flatten(1), 2)
    torch.testing.assert_close(example.logits(example.model), reference.logits(reference.model))


def test_only_spectral_norm_stays_one() -> None:
    after = {}
    for spec in ("sigma:gamma_init=one", "init-scale", "spectral-norm"):
        example = small("vit")
        stabilize_(example.model, spec)
        step_(example, lr=1e-2, steps=5)
        if spec != "init-scale":
            tt.refresh_(example.model, exact=True)  # while training, sigma follows the weights a little behind
        after[spec] = norms(example.model)
    assert after["spectral-norm"] == pytest.approx(dict.fromkeys(after["spectral-norm"], 1.0))
    for spec in ("sigma:gamma_init=one", "init-scale"):
        assert max(abs(norm - 1) for norm in after[spec].values()) > 0.01


def test_gammas_of_spectral_norm_are_not_trained() -> None:
    example = small("vit")
    stabilize_(example.model, "spectral-norm")
    step_(example, lr=0.1, steps=2)
    assert all(bool((gamma == 1).all()) for _, gamma in sigma_gamma(example.model).values())


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("attention", {"query", "key", "value", "out"}),
        ("mlp", {"up", "down"}),
        ("blocks", {"query", "key", "value", "out", "up", "down"}),
        ("all", {"query", "key", "value", "out", "up", "down", "patches", "head"}),
    ],
)
def test_which_layers(layers: str, expected: set[str]) -> None:
    model = small("vit").model
    stabilize_(model, f"sigma:layers={layers}")
    assert {name.split(".")[-2] for name in sigma_gamma(model)} == expected
    with pytest.raises(ConversionError, match="finds no Transformer block"):
        stabilize_(nn.Sequential(nn.Linear(3, 3)), "sigma:layers=mlp")


def test_mlp_and_attention_of_other_families() -> None:
    for name, count in (("gpt2", 2), ("llama", 3), ("bert", 2), ("encoder", 4)):
        model = small(name).model
        stabilize_(model, "sigma:layers=mlp")
        assert len(sigma_gamma(model)) == count, name
    encoder = small("encoder").model
    stabilize_(encoder, "sigma:layers=attention")
    assert {name.split(".", 2)[2] for name in sigma_gamma(encoder)} == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
    }


def test_redrawn_weights_and_no_norms() -> None:
    draws = []
    for seed in (0, 0, 1):
        example = small("vit")
        biases = [p.detach().clone() for n, p in example.model.named_parameters() if n.endswith("mlp.up.bias")]
        torch.manual_seed(seed)
        stabilize_(example.model, "sigma:gamma_init=one:init_std=0.4:remove_norms=true:layers=blocks")
        weights = torch.cat(
            [p.detach().flatten() for n, p in example.model.named_parameters() if "blocks" in n and p.ndim == 2]
        )
        draws.append(weights)
        # of 9,216 numbers the sample deviation strays by 0.7 %: five times that is allowed
        assert float(weights.std()) == pytest.approx(0.4, rel=0.04)
        assert abs(float(weights.mean())) < 0.02
        assert not any(isinstance(module, nn.LayerNorm) for module in example.model.modules())
        left = [p for n, p in example.model.named_parameters() if n.endswith("mlp.up.bias")]
        torch.testing.assert_close(left, biases, rtol=0, atol=0)
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert not torch.equal(draws[0], draws[2])


def test_no_norm_to_remove_is_told_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    before = model[0].weight.detach().clone()
    for spec in ("sigma", "init-scale"):
        with pytest.raises(ConversionError, match="remove_norms finds no norm layer"):
            stabilize_(model, f"{spec}:remove_norms=true:init_std=1")
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("spec", ["sigma:init_std=1", "init-scale:init_std=1"])
def test_weights_are_not_redrawn_when_their_layers_cannot_be_converted(spec: str) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.get_submodule("1").gamma = 1.0  # in the way
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConversionError, match="already has an attribute 'gamma'"):
        stabilize_(model, spec)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_options_out_of_range() -> None:
    for spec in ("sigma:init_std=0", "init-scale:init_std=-1"):
        with pytest.raises(RecipeError, match="init_std must be positive"):
            parse(spec)


def test_the_control_is_refused_beside_what_it_controls() -> None:
    model = small("vit").model
    stabilize_(model, "sigma:layers=mlp")
    with pytest.raises(ConversionError, match="use one of them"):
        stabilize_(model, "init-scale:layers=attention")


def test_weight_norm_is_the_papers_equation() -> None:
    """w = g v / |v| for every output, with its gradients left to autograd."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    stabilize_(model, "weight-norm")
    x = torch.randn(7, 5, dtype=torch.float64)
    states = model.state_dict()
    parts = [
        (states[f"{i}.parametrizations.weight.original0"], states[f"{i}.parametrizations.weight.original1"])
        for i in (0, 2)
    ]
    assert [tuple(g.shape) for g, _ in parts] == [(4, 1), (3, 1)]
    with torch.no_grad():
        for g, v in parts:
            g.uniform_(0.5, 2.0)
            v *= 3
    hidden = torch.relu(x @ (parts[0][0] * parts[0][1] / parts[0][1].norm(dim=1, keepdim=True)).T + states["0.bias"])
    expected = hidden @ (parts[1][0] * parts[1][1] / parts[1][1].norm(dim=1, keepdim=True)).T + states["2.bias"]
    torch.testing.assert_close(model(x), expected)


def test_weight_norm_of_stored_transposed_weights_is_by_output() -> None:
    model = small("gpt2").model
    stabilize_(model, "weight-norm:layers=mlp")
    layer = model.get_submodule("transformer.h.0.mlp.c_fc")
    assert layer.get_parameter("parametrizations.weight.original0").shape == (1, 96)


@pytest.mark.parametrize("other", ["qk-norm", "softcap:attention=0.1"])
def test_weight_norm_of_gpt2_goes_together_with_others(other: str) -> None:
    """Their layers are found under torch's parametrization, too."""
    alone, both = small("gpt2"), small("gpt2")
    stabilize_(alone.model, other)
    stabilize_(both.model, f"weight-norm+{other}")
    torch.testing.assert_close(both.logits(both.model), alone.logits(alone.model))


def test_folding_a_copy_leaves_the_weight_normed_model_alone() -> None:
    """torch gives a parametrized module a class of its own, and deepcopy shares it."""
    example = small("vit")
    stabilize_(example.model, "weight-norm")
    before = example.logits(example.model)
    folded = copy.deepcopy(example.model)
    fold_(folded)
    torch.testing.assert_close(example.logits(example.model), before, rtol=0, atol=0)
    torch.testing.assert_close(example.logits(folded), before)
    assert folded.get_submodule("head").weight.requires_grad
    fold_(example.model)


def test_weight_norm_checks_first() -> None:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ConversionError, match=r"0.weight and 1.weight are one weight"):
        stabilize_(tied, "weight-norm")
    zero = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        zero[1].weight[1] = 0
    with pytest.raises(ConversionError, match=r"1.weight has a row that is zero"):
        stabilize_(zero, "weight-norm")
    assert type(zero[0]) is nn.Linear
    gpt2 = small("gpt2")
    stabilize_(gpt2.model, "weight-norm")  # the head is tied to the embedding, and left alone
    assert gpt2.model.get_submodule("lm_head").weight is gpt2.model.get_submodule("transformer.wte").weight


def test_a_run_that_diverged_is_not_folded() -> None:
    model = small("vit").model
    stabilize_(model, "weight-norm:layers=mlp")
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.up.parametrizations.weight.original0")[0] = torch.nan
    with pytest.raises(ConversionError, match=r"blocks.0.mlp.up.weight is not finite"):
        fold_(model)
