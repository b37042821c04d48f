"""`layer-scale`: a small learned factor for every feature of every residual branch."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from trimtab.errors import RecipeError
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.residual import expect_unscaled, fold_branches_, residual_branches, scale_branches_, width_of
from trimtab.stabilizers.stabilizer import Stabilizer


@register("layer-scale")
@dataclass(frozen=True)
class LayerScale(Stabilizer):
    """LayerScale: what a residual branch adds is multiplied, feature by feature, by learned factors that start small.

    Touvron et al., "Going deeper with Image Transformers", ICCV 2021, arXiv 2103.17239, section 2. It changes the
    last layer of every attention and MLP, and folds into it.

    When not to use it: on pretrained weights, whose branches it nearly switches off (start it at 1 there); and with
    weight decay on the factors, which pulls them to zero.

    Attributes:
        init: where the factors start. "depth", as in the paper: 0.1 in models of up to 18 blocks, 1e-5 of up to 24,
            1e-6 in deeper ones. Or a number.
    """

    order = 20

    init: Literal["depth"] | float = "depth"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == 0:
            raise RecipeError("layer-scale: init 0 is rezero's start; give a number other than zero, or depth")

    def apply_(self, model: nn.Module) -> None:
        """Give every residual branch its factors."""
        branches = residual_branches(model)
        expect_unscaled(branches)
        depth = len({branch.block for branch in branches})
        start = (0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6) if self.init == "depth" else float(self.init)
        scale_branches_(model, [(branch, [start] * width_of(branch)) for branch in branches], trained=True)

    def fold_(self, model: nn.Module) -> None:
        """Write the factors into weights and biases."""
        fold_branches_(model)
