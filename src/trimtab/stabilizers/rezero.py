"""`rezero`: one learned factor for every residual branch, zero at the start."""

from dataclasses import dataclass

from torch import nn

from trimtab.errors import ConversionError
from trimtab.reparam import remove_norms_
from trimtab.reparam.norms import is_norm
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.residual import expect_unscaled, fold_branches_, residual_branches, scale_branches_
from trimtab.stabilizers.stabilizer import Stabilizer


@register("rezero")
@dataclass(frozen=True)
class ReZero(Stabilizer):
    """ReZero: what a residual branch adds is multiplied by one learned factor that starts at zero.

    Bachlechner et al., "ReZero is All You Need: Fast Convergence at Large Depth", UAI 2021, arXiv 2003.04887. It
    changes the last layer of every attention and MLP, and folds into it. At the start every block passes its input on;
    only the factors have a gradient then, the branches from the second step on.

    When not to use it: on pretrained weights, whose branches it switches off.

    Attributes:
        remove_norms: whether all norm layers are taken out, as in the paper.
    """

    order = 20

    remove_norms: bool = False

    def apply_(self, model: nn.Module) -> None:
        """Give every residual branch its factor."""
        branches = residual_branches(model)
        expect_unscaled(branches)
        if self.remove_norms and not any(is_norm(module) for module in model.modules()):
            raise ConversionError("remove_norms finds no norm layer: leave the option out")
        scale_branches_(model, [(branch, [0.0]) for branch in branches], trained=True)
        if self.remove_norms:
            remove_norms_(model)

    def fold_(self, model: nn.Module) -> None:
        """Write the factors into weights and biases."""
        fold_branches_(model)
