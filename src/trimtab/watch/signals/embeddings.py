"""What is measured of token embeddings."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trimtab.reparam.carried import is_sharded, whole
from trimtab.reparam.layers import Reparametrized

# So many numbers at a time: few enough for a processor's cache, enough for a GPU.
_AT_ONCE = 2**20


class TokenEmbeddingVariability(NamedTuple):
    """Token embedding variability of a table.

    Attributes:
        mean: mean over the vocabulary of the tokens' TEV.
        std: their standard deviation over the vocabulary.
    """

    mean: float
    std: float


@torch.no_grad()
def token_embedding_variability(embedding_weight: Tensor) -> TokenEmbeddingVariability:
    """Token embedding variability (TEV): how far the entries of each token's embedding spread.

    ``TEV_i`` is the standard deviation over the d entries of row i (Chung et al., EMNLP 2024, arXiv 2409.07787, who
    propose it as a cheap stand-in for the variance of gradients in pre-LN language models). For entries drawn from
    N(0, s²) the mean lies near s and the standard deviation near ``s / sqrt(2 d)``. Both standard deviations are those
    of a whole population (divided by d, not d - 1).

    Args:
        embedding_weight: shape (vocabulary, d), any floating dtype; computed in at least float32. Of a sharded one
            (a DTensor) every process must ask.

    Raises:
        ValueError: if it is not a floating matrix with at least one row and one column.
    """
    weight = embedding_weight.detach()
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"expected floating embeddings of shape (vocabulary, d), got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # Of a sharded table each process takes its own rows; to cut it further would send them around.
    parts = [weight] if is_sharded(weight) else weight.split(max(1, _AT_ONCE // weight.shape[1]))
    each = torch.cat([whole(_spread(part.to(dtype))) for part in parts]).cpu().double()
    return TokenEmbeddingVariability(each.mean().item(), each.std(correction=0).item())


def _spread(rows: Tensor) -> Tensor:
    """Standard deviation of each row, (rows,); torch's own is ten times slower on a CPU."""
    return torch.linalg.vector_norm(rows - rows.mean(dim=1, keepdim=True), dim=1) / math.sqrt(rows.shape[1])


@torch.no_grad()
def embedding_variability(model: nn.Module) -> dict[str, TokenEmbeddingVariability]:
    """TEV of every nn.Embedding of a model, by the dotted name of the module; of converted ones, of the table in use.

    Tables that several modules share are reported once, those without values not at all. The name of the model itself
    is empty.
    """
    found: dict[str, TokenEmbeddingVariability] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or id(module.weight) in seen:
            continue
        weight = module.weight
        seen.add(id(weight))
        if weight.is_meta or weight.numel() == 0 or not weight.is_floating_point():
            continue
        in_use = module.scaled("weight") if isinstance(module, Reparametrized) else weight
        found[name] = token_embedding_variability(in_use)
    return found
