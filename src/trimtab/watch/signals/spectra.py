"""What is measured of the spectrum of W_q^T W_k, the matrix behind the attention logits of one head."""

from typing import Literal

import torch
from torch import Tensor

from trimtab.spectral import exact_products


@torch.no_grad()
def qk_energy(query_weight: Tensor, key_weight: Tensor, top: int = 1) -> Tensor:
    """Share of the energy of ``W_q^T W_k`` that lies in its top singular values, for each head.

    The energy is the sum of the squared singular values. Attention logits are ``x^T W_q^T W_k y / sqrt(d_head)``:
    where most of the energy lies in few directions (share near 1), attention that collapses does so onto a subspace of
    low rank, which Qi et al. (arXiv 2505.21910) found to end training; see `collapse_kind`.

    No matrix of d_model × d_model is made: with ``W_q^T = Q_q R_q`` and ``W_k^T = Q_k R_k`` (QR) the singular values
    are those of ``R_q R_k^T``, of d_head × d_head.

    Args:
        query_weight: shape (H, d_head, d_model), rows being outputs, as a linear layer holds them.
        key_weight: shape (H_kv, d_head, d_model of the keys); with grouped-query attention H is a multiple of H_kv,
            and consecutive query heads share a key head.
        top: how many singular values count as the top, at least 1.

    Returns:
        Shape (H,), 0 to 1, in float64 for float64 weights, else float32; NaN for a head whose product is zero or
        whose weights are not finite.

    Raises:
        ValueError: for other shapes, or top < 1.
    """
    _check(query_weight, key_weight, top)
    with exact_products(query_weight.device.type):
        query, key = _triangle(query_weight), _triangle(key_weight)
        key = key.repeat_interleave(len(query) // len(key), dim=0)
        product = query @ key.mT
        usable = product.isfinite().all(-1).all(-1) & (product != 0).any(-1).any(-1)
        values = torch.linalg.svdvals(torch.where(usable[:, None, None], product, 0))
        energy = values.square()
        return torch.where(usable, energy[:, :top].sum(-1) / energy.sum(-1), torch.nan)


def collapse_kind(
    entropy: float, energy: float, *, low_entropy: float = 0.03, concentrated: float = 0.5
) -> Literal["benign", "malignant"] | None:
    """Which kind of entropy collapse a head shows; None where its entropy is not low.

    Qi et al. (arXiv 2505.21910) tell two kinds apart: attention that is sparse but of full rank (near the identity)
    trains on, attention that is sparse *and* of low rank crashes. The rank is told by the share of energy in the
    largest singular value of W_q^T W_k.

    Args:
        entropy: the head's entropy divided by its maximum, 0 to 1.
        energy: the head's `qk_energy` with ``top=1``.
        low_entropy: entropy below this counts as collapsed.
        concentrated: a share of energy from here on counts as low rank. Ours, not the paper's: one direction then
            weighs as much as all others together.

    Raises:
        ValueError: if the energy is NaN where the entropy is low.
    """
    if not entropy < low_entropy:
        return None
    if energy != energy:
        raise ValueError("expected the share of energy to be a number, got NaN: the weights are zero or not finite")
    return "malignant" if energy >= concentrated else "benign"


def _triangle(weight: Tensor) -> Tensor:
    """R of W^T = Q R for each head, the head's scale taken out: (H, d_head, d_model) to (H, k, d_head)."""
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    # The share knows no scale; with entries of order one squares neither overflow nor vanish.
    weight = weight / weight.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    finite = weight.isfinite().all(-1).all(-1)[:, None, None]
    triangle = torch.linalg.qr(torch.where(finite, weight, 0).mT, mode="r").R
    return torch.where(finite, triangle, torch.nan)


def _check(query_weight: Tensor, key_weight: Tensor, top: int) -> None:
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight.ndim != 3 or weight.numel() == 0 or not weight.is_floating_point():
            raise ValueError(
                f"expected {name} to be floating, of shape (heads, d_head, d_model), "
                f"got {weight.dtype} of shape {tuple(weight.shape)}"
            )
    (heads, width, _), (key_heads, key_width, _) = query_weight.shape, key_weight.shape
    if width != key_width or heads % key_heads:
        raise ValueError(
            "expected one d_head and a number of query heads that is a multiple of that of key heads, "
            f"got {heads} query heads of {width} and {key_heads} key heads of {key_width}"
        )
    if top < 1:
        raise ValueError(f"expected top >= 1, got {top}")
