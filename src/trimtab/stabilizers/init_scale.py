"""`init-scale`: the control of sigma-Reparam."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from trimtab.errors import ConversionError, RecipeError
from trimtab.reparam import SigmaReparam, fold_
from trimtab.stabilizers.parts import Layers
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.sigma import convert_, is_converted
from trimtab.stabilizers.stabilizer import Stabilizer


@register("init-scale")
@dataclass(frozen=True)
class InitScale(Stabilizer):
    """The control of sigma: weights start at gamma / sigma(W) · W, and nothing keeps them so.

    No paper: it tells how much of what sigma-Reparam (Zhai et al., arXiv 2303.06296) does is the scale its weights
    start with. It changes the values of the weights once, and no layer.

    When not to use it: as a cure. And never on pretrained weights, whose scale is part of what they learned.

    Attributes:
        gamma_init: the spectral norm to start with: "one", or a number.
        layers: as of sigma.
        blocks: as of sigma.
        remove_norms: as of sigma.
        init_std: as of sigma; of the directions alone, as the scale is gamma's.
    """

    order = 5  # what the others then keep or change is the scaled weight

    gamma_init: Literal["one"] | float = "one"
    layers: Layers = "all"
    blocks: Literal["auto", "one", "heads"] = "auto"
    remove_norms: bool = False
    init_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_std is not None and self.init_std <= 0:
            raise RecipeError(f"init-scale: init_std must be positive, got {self.init_std}")

    def apply_(self, model: nn.Module) -> None:
        """Scale the weights of the layers meant."""
        if is_converted(model):
            raise ConversionError(
                "init-scale is the control of sigma-Reparam, and this model has that: use one of them"
            )
        config = SigmaReparam(gamma_init=self.gamma_init, vectors=1, blocks=self.blocks)
        convert_(model, config, self.layers, self.remove_norms, self.init_std)
        fold_(model)
