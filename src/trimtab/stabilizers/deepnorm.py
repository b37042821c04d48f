"""`deepnorm`: post-LN that trains at great depth."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from trimtab.errors import ConversionError
from trimtab.reparam.blocks import is_linear
from trimtab.stabilizers.parts import attention_of
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.residual import (
    Branch,
    expect_unscaled,
    fold_branches_,
    last_linear,
    residual_branches,
    scale_branches_,
)
from trimtab.stabilizers.rows import Rows, all_rows, expect_scalable, scale_, value_rows
from trimtab.stabilizers.stabilizer import Stabilizer


@register("deepnorm")
@dataclass(frozen=True)
class DeepNorm(Stabilizer):
    """DeepNorm: post-LN with the residual stream scaled up by alpha, and weights that start beta times as large.

    Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", arXiv 2203.00555, figure 2. It changes post-LN
    models: ``LN(alpha x + f(x))``. Since a norm does not see the scale of its input, the branch is multiplied by
    1 / alpha instead, and the norm's eps by 1 / alpha², which is the same function. Values, attention outputs and MLPs
    are multiplied by beta, once; the paper draws them by Xavier's rule first, so give your model that start. A recipe's
    model gets norm="post". It folds; the folded model's norms keep their eps, which is no part of a state dict.

    alpha and beta: (2N)^¼ and (8N)^-¼ for N blocks without cross-attention; beside M blocks with it 0.81 (N⁴M)^(1/16)
    and 0.87 (N⁴M)^(-1/16); for these M blocks (3M)^¼ and (12M)^-¼.

    When not to use it: on pre-LN models, where there is no norm after the sum, and on pretrained weights.
    Compare it with init-scale on a post-LN model, which tells how much of the effect is the start of the weights alone.
    """

    order: ClassVar[int] = 20

    def apply_(self, model: nn.Module) -> None:
        """Scale branches, eps and weights."""
        branches = residual_branches(model)
        expect_unscaled(branches)
        norms = [following_norm(model, branch) for branch in branches]
        crossed = {b.block for b in branches if sum(o.block == b.block and o.kind == "attention" for o in branches) > 1}
        plain = {branch.block for branch in branches} - crossed
        constants = {
            block: alpha_beta(len(plain), len(crossed), cross=block in crossed) for block in (*plain, *crossed)
        }
        shrunk = [(rows, constants[block][1]) for block, rows in _rows_with_beta(model, branches)]
        for rows, _ in shrunk:
            expect_scalable(rows)
        alphas = [constants[branch.block][0] for branch in branches]
        scale_branches_(
            model, [(branch, [1 / alpha]) for branch, alpha in zip(branches, alphas, strict=True)], trained=False
        )
        for norm, alpha in zip(norms, alphas, strict=True):
            norm.eps /= alpha**2
        with torch.no_grad():
            for rows, beta in shrunk:
                scale_(rows, beta)

    def changes(self, recipe: Any) -> dict[str, Any]:
        """Make the recipe's model post-LN, if it has a choice."""
        return {"model.norm": "post"} if hasattr(getattr(recipe, "model", None), "norm") else {}

    def fold_(self, model: nn.Module) -> None:
        """Write 1 / alpha into weights and biases."""
        fold_branches_(model)


def alpha_beta(plain: int, crossed: int, *, cross: bool) -> tuple[float, float]:
    """Return alpha and beta of the paper's figure 2.

    Args:
        plain: blocks without cross-attention: N of an encoder, or M of a decoder alone.
        crossed: blocks with cross-attention: M of a decoder beside an encoder.
        cross: whether the block asked about is one of these.
    """
    if cross:
        return (3 * crossed) ** 0.25, (12 * crossed) ** -0.25
    if crossed:
        return 0.81 * (plain**4 * crossed) ** (1 / 16), 0.87 * (plain**4 * crossed) ** (-1 / 16)
    return (2 * plain) ** 0.25, (8 * plain) ** -0.25


def following_norm(model: nn.Module, branch: Branch) -> nn.LayerNorm:
    """Return the LayerNorm of the sum that a branch is added to.

    Raises:
        ConversionError: the model is not post-LN, or not known to be.
    """
    block = model.get_submodule(branch.block)
    own = branch.name[len(branch.block) :].lstrip(".")
    holder = model.get_submodule(branch.name.rpartition(".")[0])
    norm: Any = None
    if isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        last = "norm3" if isinstance(block, nn.TransformerDecoderLayer) else "norm2"
        names = {"self_attn": "norm1", "multihead_attn": "norm2", "linear2": last}
        norm = None if block.norm_first else getattr(block, names.get(own, ""), None)
    elif getattr(block, "post_norm", None) is True:  # Trimtab's models
        norm = getattr(block, own.partition(".")[0] + "_norm", None)
    elif own.endswith("dense"):  # BERT and its family
        norm = holder._modules.get("LayerNorm")
    if not isinstance(norm, nn.LayerNorm):
        raise ConversionError(
            f"deepnorm needs a LayerNorm after the sum that {branch.name} is added to, and found none: it is for "
            "post-LN models, of torch's layers (norm_first=False), BERT's family and Trimtab's (norm='post')"
        )
    return norm


def _rows_with_beta(model: nn.Module, branches: list[Branch]) -> list[tuple[str, Rows]]:
    """Return, by block, what starts beta times as large: values, attention outputs and all of the MLP."""
    of_attention, ends = attention_of(model), {id(last_linear(branch.layer)) for branch in branches}
    found: list[tuple[str, Rows]] = []
    for block in dict.fromkeys(branch.block for branch in branches):
        for own, module in model.get_submodule(block).named_modules():
            name = ".".join(part for part in (block, own) if part)
            if is_linear(module) and (not of_attention(name) or id(module) in ends):
                found.append((block, all_rows(module, name)))
            elif of_attention(name):
                holder = model.get_submodule(name.rpartition(".")[0])
                found += [(block, rows) for rows in value_rows(holder, name, module)]
    return found
