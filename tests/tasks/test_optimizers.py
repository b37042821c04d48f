import pytest
import torch
from torch import nn

from trimtab.errors import RecipeError
from trimtab.models import ViT
from trimtab.reparam import reparametrize_
from trimtab.tasks.images import vit_digits
from trimtab.tasks.optimizers import build_optimizers, hidden_matrices
from trimtab.tasks.recipe import Recipe


def names(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    known = {id(p): name for name, p in model.named_parameters()}
    return [known[id(p)] for p in parameters]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lars"])
def test_the_recipe_is_what_the_optimiser_has(name: str) -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    recipe = Recipe(optimizer=name, lr=0.5, betas=(0.8, 0.9), momentum=0.7, trust_coefficient=0.02, weight_decay=0.1)
    (optimizer,) = recipe.optimizers(model)
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__.lower() == name
    assert group["params"] == [model.weight]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.1)
    assert group.get("betas", (0.8, 0.9)) == (0.8, 0.9)
    assert group.get("momentum", 0.7) == 0.7
    assert group.get("trust_coefficient", 0.02) == 0.02


def test_lars_moves_a_weight_by_a_share_of_its_norm_and_a_bias_by_its_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (optimizer,) = Recipe(optimizer="lars", lr=0.5, trust_coefficient=0.02).optimizers(model)
    model(torch.randn(5, 3)).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = before["weight"] - model.weight
    # You et al., equations (4) and (6), the first step: lr · trust · |w| along the gradient
    expected = 0.5 * 0.02 * before["weight"].norm() * gradients["weight"] / gradients["weight"].norm()
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(before["bias"] - model.bias, 0.5 * gradients["bias"], rtol=1e-6, atol=1e-8)


def test_muon_gets_the_matrices_inside_and_adamw_the_rest() -> None:
    pytest.importorskip("torch", "2.9")
    model = ViT(vit_digits().model)
    reparametrize_(model)
    muon, adamw = build_optimizers(Recipe(optimizer="muon", lr=0.01, weight_decay=0.1), model)
    matrices = names(model, muon.param_groups[0]["params"])
    inside = ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")
    assert sorted(matrices) == sorted(f"blocks.{i}.{layer}.weight" for i in range(4) for layer in inside)
    rest = names(model, [p for group in adamw.param_groups for p in group["params"]])
    assert {"position", "patches.weight", "head.weight", "blocks.0.mlp.up.gamma", "norm.bias"} <= set(rest)
    assert len(rest) + len(matrices) == len(list(model.parameters()))
    for optimizer in (muon, adamw):
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.01, 0.1)


def test_what_has_one_dimension_does_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.LayerNorm(3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    reparametrize_(model[0])
    (optimizer,) = build_optimizers(Recipe(weight_decay=0.1), model)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert names(model, decayed["params"]) == ["0.weight", "2.parametrizations.weight.original1"]
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(RecipeError, match="no parameter to train"):
        build_optimizers(Recipe(), nn.Identity())


def test_embeddings_and_a_head_tied_to_one_are_not_for_muon() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(9, 4), "attend": nn.MultiheadAttention(4, 2), "inner": nn.Linear(4, 4),
         "head": nn.Linear(4, 9, bias=False)}
    )  # fmt: skip
    model["head"].weight = model["embed"].weight
    assert names(model, hidden_matrices(model)) == ["attend.in_proj_weight", "attend.out_proj.weight", "inner.weight"]


def test_of_a_weight_norm_the_directions_are_for_muon() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(normed, nn.Linear(3, 2))
    assert [p.shape for p in hidden_matrices(model)] == [(3, 3)]


def test_a_model_without_inner_matrices_is_refused() -> None:
    with pytest.raises(RecipeError, match="muon found no matrix"):
        build_optimizers(Recipe(optimizer="muon"), nn.Linear(3, 3))


def test_an_old_torch_without_muon_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RecipeError, match=r"muon needs torch 2\.9 or newer"):
        build_optimizers(Recipe(optimizer="muon"), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))


def test_weight_decay_reaches_sgd() -> None:
    model = nn.Linear(2, 2)
    (optimizer,) = build_optimizers(Recipe(optimizer="sgd", lr=1.0, weight_decay=0.5), model)
    before = model.weight.detach().clone()
    (0 * model.weight.sum()).backward()
    optimizer.step()
    assert torch.equal(model.weight, 0.5 * before)
