"""`low-rank`: query, key and value projections as products of two factors."""

from dataclasses import dataclass

from torch import nn

from trimtab.errors import RecipeError
from trimtab.stabilizers.low_rank_layers import Start, low_rank_
from trimtab.stabilizers.low_rank_merge import low_rank_layers, merge_low_rank_, was_converted
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer


@register("low-rank")
@dataclass(frozen=True)
class LowRank(Stabilizer):
    """Low-rank attention (MLRA): W_q, W_k and W_v are each the product of two factors, both of them trained.

    Chung et al., "Stable Language Model Pre-training by Reducing Embedding Variability", EMNLP 2024, arXiv 2409.07787:
    against the growth of the embeddings' variance with depth in pre-LN language models. `low_rank_` replaces the layers
    (state-dict keys ``...query.down.weight`` and ``...query.up.weight``), and it folds: the factors are multiplied.
    With sigma each of the two factors has a sigma of its own, as any layer. nn.MultiheadAttention is refused.

    When not to use it: on a trained model whose W_q, W_k or W_v are of full rank, of which start=svd keeps only the
    best approximation (`low_rank_` tells the error). Where fused projections are faster than three times two products.

    Attributes:
        rank: features between the factors; None is half the width, with which the number of parameters stays.
        start: "svd", the best approximation of the weights; "fresh", factors drawn so that the product has the weight's
            variance.
    """

    order = 3  # what the others then keep or change are the factors
    folds_last = True

    rank: int | None = None
    start: Start = "svd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"low-rank: rank must be at least 1, got {self.rank}")

    def apply_(self, model: nn.Module) -> None:
        """Replace the query, key and value layers of every attention."""
        low_rank_(model, self.rank, start=self.start)

    def fold_(self, model: nn.Module) -> None:
        """Multiply the factors of the layers that were replaced."""
        if any(was_converted(layer) for layer in low_rank_layers(model).values()):
            merge_low_rank_(model, lambda layer, name: was_converted(layer))
