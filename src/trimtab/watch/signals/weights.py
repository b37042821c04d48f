"""What is measured of weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trimtab.spectral import spectral_norm
from trimtab.watch.signals.gradients import is_elsewhere


@torch.no_grad()
def plain_sigmas(model: nn.Module, skip: Iterable[str], starts: dict[str, Tensor]) -> dict[str, list[float]]:
    """Largest singular value of every weight matrix that is not converted, by dotted parameter name.

    Matrices are parameters of two or more dimensions whose name ends in "weight", flattened to
    (out, everything else); embeddings, and heads tied to one, are none.

    Args:
        model: the model.
        skip: names to leave out: the converted weights.
        starts: right singular vectors by name; read to start from, and filled with the new ones.

    Returns:
        A list of one number for each matrix; NaN when the weight holds NaN or inf.
    """
    converted = set(skip)
    modules = list(model.named_modules())
    known = {id(p) for _, m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters()}
    sigmas: dict[str, list[float]] = {}
    for prefix, module in modules:
        for own_name, weight in module.named_parameters(prefix, recurse=False):
            matrix_like = own_name.endswith("weight") and weight.ndim >= 2 and weight.numel() > 0
            matrix_like = matrix_like and weight.is_floating_point()
            if not matrix_like or own_name in converted or id(weight) in known or is_elsewhere(weight):
                continue
            known.add(id(weight))
            if not weight.isfinite().all():
                sigmas[own_name] = [float("nan")]
                continue
            sigma, starts[own_name], _ = spectral_norm(weight.detach().flatten(1), starts.get(own_name))
            sigmas[own_name] = [sigma.item()]
    return sigmas
