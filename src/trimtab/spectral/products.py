"""Products of a few vectors with a large matrix, the operation all of sigma is made of.

A weight is read from memory twice in every refresh, and a handful of vectors gives the processor little else to do.
BLAS leaves such thin products to one thread; cut into panels, a few a thread, they run near the speed of memory.
"""

import torch
from torch import Tensor

# Below this many entries a product is done before threads pay.
_PANEL_MIN_SIZE = 2**18
_PANELS_PER_THREAD = 4
# A half-precision matrix is widened this many entries at a time, so that no whole float32 copy of it is made.
_WIDEN_SIZE = 2**22


def thin_product(vectors: Tensor, matrix: Tensor) -> Tensor:
    """Return ``vectors @ matrix``, computed in the precision of the vectors.

    Args:
        vectors: shape (B, k, m), k small.
        matrix: shape (B, m, n), its rows or its columns contiguous.

    Returns:
        Shape (B, k, n).
    """
    batch, m, n = matrix.shape
    if matrix.dtype != vectors.dtype:
        if matrix.numel() > _WIDEN_SIZE and m > 1:
            half = m // 2
            return thin_product(vectors[:, :, :half], matrix[:, :half]) + thin_product(
                vectors[:, :, half:], matrix[:, half:]
            )
        matrix = matrix.to(vectors.dtype)
    panels = _panels(batch, m, n, matrix)
    if panels == 1:
        return torch.bmm(vectors, matrix)
    k = vectors.shape[1]
    if matrix.stride(-1) == 1:  # cut along m: the panels' products add up
        even = m - m % panels
        cut = matrix[:, :even].unflatten(1, (panels, -1)).flatten(0, 1)
        parts = vectors[:, :, :even].unflatten(2, (panels, -1)).transpose(1, 2).flatten(0, 1)
        product = torch.bmm(parts, cut).unflatten(0, (batch, panels)).sum(1)
        return product if even == m else product.baddbmm_(vectors[:, :, even:], matrix[:, even:])
    even = n - n % panels  # cut along n: the panels' products lie side by side
    cut = matrix[:, :, :even].unflatten(2, (panels, -1)).transpose(1, 2).flatten(0, 1)
    repeated = vectors.unsqueeze(1).expand(batch, panels, k, m).flatten(0, 1)
    product = torch.bmm(repeated, cut).unflatten(0, (batch, panels)).transpose(1, 2).flatten(2)
    return product if even == n else torch.cat([product, torch.bmm(vectors, matrix[:, :, even:])], dim=2)


def _panels(batch: int, m: int, n: int, matrix: Tensor) -> int:
    if matrix.device.type != "cpu" or torch.compiler.is_compiling() or matrix.numel() < _PANEL_MIN_SIZE:
        return 1
    threads = torch.get_num_threads()
    panels = _PANELS_PER_THREAD * threads
    return 1 if batch >= threads or panels > min(m, n) else panels
