"""What is measured of gradients."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> float | None:
    """L2 norm of all gradients together; None without gradients, or when they are sharded over processes."""
    norms = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if is_elsewhere(gradient):
            return None
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()
        # float64, so that the squares of a diverging run's gradients do not overflow; Apple's GPUs have none.
        wide = torch.float32 if gradient.device.type == "mps" else torch.float64
        absolute = gradient.abs() if gradient.is_complex() else gradient
        norms.append(torch.linalg.vector_norm(absolute, dtype=wide).cpu().double())
    return torch.linalg.vector_norm(torch.stack(norms)).item() if norms else None


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether the numbers are not all here: a DTensor is spread over processes, a meta tensor has none."""
    return hasattr(tensor, "placements") or tensor.is_meta
