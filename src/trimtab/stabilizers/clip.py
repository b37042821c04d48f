"""`clip`: gradients are shortened to a largest norm."""

from dataclasses import dataclass
from typing import Any

from trimtab.errors import RecipeError
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer


@register("clip")
@dataclass(frozen=True)
class Clip(Stabilizer):
    """Gradient clipping: a gradient longer than a largest norm, over all parameters, is shortened to it.

    Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, arXiv
    1211.5063. It changes the recipe's ``clip`` and no model.

    When not to use it: against a slow rise of attention logits under Adam, whose updates hardly depend on the
    gradient's length.

    Attributes:
        norm: the largest norm.
    """

    norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm <= 0:
            raise RecipeError(f"clip: norm must be positive, got {self.norm}")

    def changes(self, recipe: Any) -> dict[str, Any]:
        """Set the recipe's largest gradient norm."""
        return {"clip": float(self.norm)}
