"""`Stabilizer`: what every stabilizer is, and how one is added."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from trimtab.stabilizers.options import check_options


@dataclass(frozen=True)
class Stabilizer:
    """A way to hold a training run steady: a frozen dataclass whose fields are its options.

    A subclass overrides what it needs, and its docstring tells the paper, what it changes and when not to use it. Its
    first line is shown in tables. It is added by ``@register("its-name")``.

    Attributes:
        name: under which it is registered.
        order: where it stands when several are applied together: lower ones first. Weights are changed at 10, what
            their layers put out after 10.
        folds_last: whether `fold_` comes to it after all others, as they changed the layers that it put there.

    Raises:
        RecipeError: an option has a value that its type does not allow.
    """

    name: ClassVar[str] = ""
    order: ClassVar[int] = 50
    folds_last: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def apply_(self, model: nn.Module) -> None:
        """Change the model in place; everything is checked before anything is touched.

        Raises:
            ConversionError: the model has nothing of what it changes, or something that it cannot change.
        """

    def changes(self, recipe: Any) -> dict[str, Any]:
        """Fields of the recipe that it replaces, by dotted name: ``{"clip": 1.0}``, ``{"model.norm": "post"}``."""
        return {}

    def fold_(self, model: nn.Module) -> None:
        """Take out of the model again what can be folded into its weights, with the same outputs.

        What is to be folded is found in the model itself; where there is nothing, nothing happens.
        """
