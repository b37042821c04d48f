"""`none`: the model as it is."""

from dataclasses import dataclass

from torch import nn

from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer


@register("none")
@dataclass(frozen=True)
class NoStabilizer(Stabilizer):
    """Nothing: the baseline that every other stabilizer is compared with."""

    def apply_(self, model: nn.Module) -> None:
        """Leave the model as it is."""
