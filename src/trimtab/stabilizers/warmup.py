"""`warmup`: the learning rate rises at the start."""

from dataclasses import dataclass
from typing import Any

from trimtab.errors import RecipeError
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer


@register("warmup")
@dataclass(frozen=True)
class Warmup(Stabilizer):
    """Learning-rate warmup: it rises linearly from zero over the first steps.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 5.3; as a stabilizer of large batches Goyal et
    al., arXiv 1706.02677. It changes the recipe's ``warmup_steps`` and no model.

    When not to use it: for runs so short that the warmup takes a good part of them; and it does not help a run that
    diverges long after the start.

    Attributes:
        steps: how many; None is a tenth of the recipe's, also where a limit of seconds may end the run sooner.
    """

    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise RecipeError(f"warmup: steps must be at least 1, got {self.steps}")

    def changes(self, recipe: Any) -> dict[str, Any]:
        """Set the recipe's warmup steps.

        Raises:
            RecipeError: the recipe has no steps to take a tenth of.
        """
        if self.steps is None and not hasattr(recipe, "steps"):
            raise RecipeError(
                f"warmup takes a tenth of the recipe's steps, and {type(recipe).__name__} has no field 'steps': say "
                "how many, warmup:steps=..."
            )
        return {"warmup_steps": self.steps if self.steps is not None else max(1, recipe.steps // 10)}
