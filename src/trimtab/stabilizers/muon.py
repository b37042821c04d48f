"""`muon`: orthogonalised updates for the hidden matrices."""

from dataclasses import dataclass
from typing import Any

from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer


@register("muon")
@dataclass(frozen=True)
class Muon(Stabilizer):
    """Muon: hidden matrices take orthogonalised momentum steps, all else AdamW's.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; at scale Liu et al., "Muon is
    Scalable for LLM Training", arXiv 2502.16982. It changes the recipe's ``optimizer`` and no model. The engine
    gives Muon's updates the size of AdamW's, so that the learning rate means the same.

    When not to use it: alone against exploding attention logits, which it makes more likely (Kimi K2, arXiv
    2507.20534, adds QK-Clip for that: "muon+qk-clip"); or for convolutions and embeddings, which it is not made for.
    """

    def changes(self, recipe: Any) -> dict[str, Any]:
        """Set the recipe's optimiser."""
        return {"optimizer": "muon"}
