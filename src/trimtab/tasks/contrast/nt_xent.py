"""NT-Xent, the loss of SimCLR: two views of an image find each other among all other views of the step.

Shape letters: B pairs of this process, N pairs of all processes together, D features of an embedding.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """Normalised temperature-scaled cross-entropy (Chen et al., ICML 2020, arXiv 2002.05709, eq. 1).

    Each of the 2N views picks its partner out of the 2N - 1 others by the cosine of their embeddings. Where
    torch.distributed runs, the others are those of all processes: the mean of the processes' losses, and of their
    gradients, as DDP and FSDP2 take it, is then exactly the loss and gradient of one process that has everything.

    Computed in float32, or float64 for such embeddings, also under autocast. An embedding that is zero or not finite
    has no direction: the loss is then NaN.

    Args:
        first: embeddings of one view of each image, (B, D), B the same in all processes; of any length.
        second: those of the other view, in the same order.
        temperature: by which cosines are divided.

    Returns:
        The mean over the views of this process, (), in nats.

    Raises:
        ValueError: the embeddings have other shapes, there is only one pair in all processes together (which has no
            negatives), or the temperature is not positive.
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"expected two views of the same shape (B, D), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    rank, processes = place()
    pairs = len(first)
    if pairs * processes < 2:
        raise ValueError(f"expected at least 2 pairs, got {pairs}: the negatives of a pair are the others of its batch")
    with torch.autocast(first.device.type, enabled=False):
        own = torch.stack([_direction(first), _direction(second)])  # (2, B, D)
        everyone = gathered(own, dim=1).flatten(0, 1)  # (2, N, D) -> (2N, D)
        logits = own.flatten(0, 1) @ everyone.T / temperature  # (2B, 2N)
        row = torch.arange(pairs, device=first.device) + rank * pairs
        mine, partner = torch.cat([row, row + processes * pairs]), torch.cat([row + processes * pairs, row])
        logits = logits.scatter(1, mine[:, None], -torch.inf)  # no view is its own negative
        return F.cross_entropy(logits, partner)


def gathered(own: Tensor, dim: int = 0) -> Tensor:
    """Join what the processes hold, in their order; each must give the same shape. Alone, it is what was given.

    The gradient that comes back to each process is the sum over the losses of all of them.
    """
    if place()[1] == 1:
        return own
    joined: Tensor = _Gather.apply(own, dim)
    return joined


class _Gather(torch.autograd.Function):
    """All-gather along a dimension, whose backward sums over the processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size(), ctx.dim)[dist.get_rank()], None


def _direction(embeddings: Tensor) -> Tensor:
    """Embeddings of length 1, (B, D), at least float32."""
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    # The largest entry first, so that squares neither overflow nor vanish; it is a constant factor of the direction.
    scaled = wide / wide.detach().abs().amax(dim=1, keepdim=True)
    return scaled / scaled.norm(dim=1, keepdim=True)


def place() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
