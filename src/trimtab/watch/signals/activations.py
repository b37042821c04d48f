"""What is measured of activations."""

import torch
from torch import Tensor

from trimtab.reparam.carried import is_sharded
from trimtab.spectral.norms import row_norms

# Logits are widened to float32 so many at a time.
_AT_ONCE = 2**22


@torch.no_grad()
def mean_square(activations: Tensor) -> Tensor:
    """Mean of the squared entries of (..., d), in at least float32: shape (), detached.

    Raises:
        ValueError: if the tensor is sharded, empty, not floating, or has no dimension.
    """
    _check(activations)
    dtype = torch.promote_types(activations.dtype, torch.float32)
    return row_norms(activations.detach(), dtype).square().sum() / activations.numel()


@torch.no_grad()
def mean_square_log_z(logits: Tensor) -> Tensor:
    """Mean over all positions of ``(log Z)²``, with ``Z = sum_i exp(logit_i)``: shape (), float32, detached.

    The softmax does not see log Z, so nothing but its penalty, the z-loss ``1e-4 · (log Z)²``, holds the output logits
    in place; where they drift, log Z grows in magnitude long before the loss goes (Wortsman et al., arXiv 2309.14322).

    Args:
        logits: shape (..., classes), floating.

    Raises:
        ValueError: if the tensor is sharded, empty, not floating, or has no dimension.
    """
    _check(logits)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.detach().reshape(-1, logits.shape[-1])
    parts = rows.split(max(1, _AT_ONCE // rows.shape[1]))
    return torch.stack([part.to(dtype).logsumexp(-1).square().sum() for part in parts]).sum() / len(rows)


def _check(tensor: Tensor) -> None:
    if is_sharded(tensor) or tensor.ndim == 0 or tensor.numel() == 0 or not tensor.is_floating_point():
        raise ValueError(
            f"expected a whole floating tensor with entries, got {type(tensor).__name__} of {tensor.dtype} "
            f"and shape {tuple(tensor.shape)}"
        )
