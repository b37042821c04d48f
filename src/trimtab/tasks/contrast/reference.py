"""NT-Xent, slow and readable: what the fast one is held against."""

import torch
from torch import Tensor


def nt_xent_reference(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Write eq. 1 of Chen et al. (arXiv 2002.05709) out: one view after the other, one other view after the other.

    Args:
        first: embeddings of one view of each of N images, (N, D).
        second: those of the other view.
        temperature: by which cosines are divided.

    Returns:
        The mean over the 2N views, (), in nats.
    """
    views = [*first, *second]
    total = first.new_zeros(())
    for i, view in enumerate(views):
        partner = (i + len(first)) % len(views)
        others = [k for k in range(len(views)) if k != i]
        chances = {k: torch.exp(_cosine(view, views[k]) / temperature) for k in others}
        total = total - torch.log(chances[partner] / torch.stack([*chances.values()]).sum())
    return total / len(views)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())
