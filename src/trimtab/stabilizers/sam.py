"""`sam`: sharpness-aware minimisation, steps by the gradient from the worst point nearby."""

from dataclasses import dataclass
from typing import Any

from trimtab.errors import RecipeError
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer


@register("sam")
@dataclass(frozen=True)
class SharpnessAware(Stabilizer):
    """SAM: the optimiser steps by the gradient from the worst point nearby, which leads to flatter minima.

    Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, arXiv 2010.01412;
    adaptive, Kwon et al., "ASAM", ICML 2021, arXiv 2102.11600; for Transformers that forecast, Ilbert et al.,
    "SAMformer", ICML 2024, arXiv 2402.10198. It changes the recipe's ``rho`` and ``adaptive`` and no model.

    When not to use it: where compute is what limits a run, since a step costs two; with "muon", which is two
    optimisers, and in fp16 it is refused.

    Attributes:
        rho: radius of the ball; about ten times larger where it is adaptive.
        adaptive: whether the ball reaches further along large weights.
    """

    rho: float = 0.05
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho <= 0:
            raise RecipeError(f"sam: rho must be positive, got {self.rho}")

    def changes(self, recipe: Any) -> dict[str, Any]:
        """Set the recipe's radius, and what it is relative to."""
        return {"rho": float(self.rho), "adaptive": self.adaptive}
