"""The optimisers that a recipe names, made for a model."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import SGD, Adam, AdamW, Optimizer

from trimtab.errors import RecipeError
from trimtab.optim import ASAM, SAM
from trimtab.reparam.carried import is_sharded

if TYPE_CHECKING:
    from trimtab.tasks.recipe import Recipe


def build_optimizers(recipe: "Recipe", model: nn.Module) -> list[Optimizer]:
    """Make the optimisers of a recipe for a model that is where, and in the shards that, it will be trained.

    Weights decay; biases, gains of norms, gammas and scales of branches, which have one dimension, do not. With a
    `rho`, the optimiser is inside of SAM.

    Raises:
        RecipeError: nothing can be trained; this torch has no Muon, or the model nothing for it; or LARS is not
            installed.
    """
    optimizers = _base_optimizers(recipe, model)
    if recipe.rho is None:
        return optimizers
    (base,) = optimizers
    kind = ASAM if recipe.adaptive else SAM
    return [kind(base.param_groups, lambda _: base, recipe.rho, model=model)]


def _base_optimizers(recipe: "Recipe", model: nn.Module) -> list[Optimizer]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise RecipeError("the model has no parameter to train")
    lr, betas, decay = recipe.lr, recipe.betas, recipe.weight_decay
    if recipe.optimizer == "sgd":
        return [SGD(_groups(model, trained, decay), lr, momentum=recipe.momentum)]
    if recipe.optimizer == "adam":
        return [Adam(_groups(model, trained, decay), lr, betas=betas, fused=True)]
    if recipe.optimizer == "adamw":
        return [AdamW(_groups(model, trained, decay), lr, betas=betas, fused=True)]
    if recipe.optimizer == "lars":
        return [_lars(recipe, _groups(model, trained, decay))]
    if not hasattr(torch.optim, "Muon"):
        raise RecipeError(f"optimizer muon needs torch 2.9 or newer, this is {torch.__version__}: use adamw, or update")
    matrices = hidden_matrices(model)
    if not matrices:
        raise RecipeError("optimizer muon found no matrix between the first and the last layer to train: use adamw")
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in chosen]
    # Its steps are scaled to the size of AdamW's, so that one learning rate and one decay serve both (Liu et al.,
    # arXiv 2502.16982, section 2.2).
    muon = torch.optim.Muon(matrices, lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, AdamW(_groups(model, rest, decay), lr, betas=betas, fused=True)] if rest else [muon]


def _lars(recipe: "Recipe", groups: list[dict[str, Any]]) -> Optimizer:
    try:
        from pytorch_optimizer import LARS
    except ImportError:
        raise RecipeError(
            "optimizer lars comes from the package pytorch-optimizer, which is missing: pip install 'trimtab[lab]'"
        ) from None
    sharded = any(is_sharded(p) for group in groups for p in group["params"])
    made = LARS(
        groups,
        recipe.lr,
        momentum=recipe.momentum,
        trust_coefficient=recipe.trust_coefficient,
        foreach=False if sharded else None,  # torch has no _foreach_copy_ of shards
    )
    return cast(Optimizer, made)


def _groups(model: nn.Module, parameters: list[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """One group of what decays and one of what does not; a single one without decay, in the model's order."""
    if decay == 0:
        return [{"params": parameters, "weight_decay": 0.0}]
    # The lengths of a weight norm are gains, though of shape (out, 1).
    normed = [module for module in model.modules() if isinstance(module, ParametrizationList) and not module.is_tensor]
    gains = {id(module.original0) for module in normed}
    weights = [p for p in parameters if p.ndim > 1 and id(p) not in gains]
    others = [p for p in parameters if p.ndim <= 1 or id(p) in gains]
    groups = [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained weights (rows, columns) of linear maps between hidden features, which is what Muon is for.

    Left out are embeddings and whatever is tied to one, and the last linear layer, which is the head.
    """
    modules = list(model.modules())
    embedded = {id(p) for module in modules if isinstance(module, nn.Embedding) for p in module.parameters()}
    linear = [p for module in modules if _is_linear(module) for p in module.parameters(recurse=False) if _is_matrix(p)]
    last = linear[-1:]
    found = {id(p): p for p in linear if p.requires_grad and id(p) not in embedded and p is not last[0]}
    return list(found.values())


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and min(parameter.shape) > 1  # the lengths of a weight norm are a column


def _is_linear(module: nn.Module) -> bool:
    # Hugging Face's Conv1D is a linear layer; a parametrized weight lies in a ParametrizationList.
    return isinstance(module, nn.Linear | nn.MultiheadAttention) or type(module).__name__ in (
        "Conv1D",
        "ParametrizationList",
    )
