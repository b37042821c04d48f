"""What is measured of weights: which are matrices, and the stable rank of one."""

import math
from collections.abc import Iterable

from torch import Tensor, nn

from trimtab.spectral import leading
from trimtab.spectral.norms import norms


def plain_weights(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, Tensor]:
    """Every weight matrix of a model, by dotted parameter name.

    Matrices are parameters of two or more dimensions whose name ends in "weight"; embeddings, and heads tied to one,
    are none. Tied weights are named once.

    Args:
        model: the model.
        skip: names to leave out: the converted weights.
    """
    converted = set(skip)
    modules = list(model.named_modules())
    seen = {id(p) for _, m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters()}
    found: dict[str, Tensor] = {}
    for prefix, module in modules:
        for own_name, weight in module._parameters.items():
            if weight is None or not own_name.endswith("weight") or weight.ndim < 2 or id(weight) in seen:
                continue
            name = f"{prefix}.{own_name}" if prefix else own_name
            if name not in converted and weight.is_floating_point() and weight.numel() and not weight.is_meta:
                seen.add(id(weight))
                found[name] = weight
    return found


def stable_rank(weight: Tensor, sigma: float | None = None) -> float:
    """Stable rank ``||W||_F² / sigma²`` of a weight flattened to (out, everything else).

    It lies between 1 (one direction carries all) and the rank, moves smoothly with W, and is not moved by small
    singular values (Rudelson and Vershynin, arXiv math/0503442).

    Args:
        weight: two or more dimensions, floating.
        sigma: its largest singular value, if that is known; else it is computed exactly.

    Returns:
        NaN for a zero weight.

    Raises:
        ValueError: as `trimtab.spectral.spectral_norm`, when sigma is not given.
    """
    if sigma is None:
        sigma = leading(weight.detach().flatten(1), 1).sigma.item()
    return (norms([weight])[0].item() / sigma) ** 2 if sigma else math.nan
