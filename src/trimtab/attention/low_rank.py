"""Low-rank attention: the query, key and value projections are products of two factors.

Chung et al., "Stable Language Model Pre-training by Reducing Embedding Variability", EMNLP 2024, arXiv 2409.07787
(multi-head low-rank attention, MLRA). The factors are two plain nn.Linear layers, so that whatever knows those (a
spectral norm for each, an optimiser, sharding) knows these.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def default_rank(in_features: int, out_features: int) -> int:
    """Return the largest rank whose two factors have no more entries than the matrix: d / 2 of a d × d matrix."""
    return max(1, in_features * out_features // (in_features + out_features))


class LowRankLinear(nn.Module):
    """A linear layer whose weight is a product of two: ``x -> up(down(x))``, (..., in_features) -> (..., out_features).

    Attributes:
        down: the first factor, nn.Linear from in_features to rank, without bias.
        up: the second, nn.Linear from rank to out_features; its bias is that of the layer.

    Args:
        in_features: size of the inputs.
        out_features: size of the outputs.
        rank: features between the factors; None is `default_rank`.
        bias: whether there is a bias.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: the rank is below 1, or above the smaller of both sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rank = default_rank(in_features, out_features) if rank is None else rank
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"expected a rank of 1 to {min(in_features, out_features)} for {in_features} inputs and {out_features} "
                f"outputs, got {rank}"
            )
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.start_(1 / math.sqrt(3 * in_features))  # as the weights of nn.Linear
        if self.up.bias is not None:
            nn.init.uniform_(self.up.bias, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))

    @property
    def in_features(self) -> int:
        """Size of the inputs."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Size of the outputs."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """Features between the factors."""
        return self.down.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        mapped: Tensor = self.up(self.down(x))
        return mapped

    @torch.no_grad()
    def start_(self, std: float) -> None:
        """Draw both factors from N(0, std / sqrt(rank)): the entries of their product then have the variance std².

        An entry of the product is a sum over `rank` products of independent entries, so its variance is
        ``rank · (std / sqrt(rank))²``.
        """
        for factor in (self.down, self.up):
            factor.weight.normal_(std=math.sqrt(std / math.sqrt(self.rank)))


class LowRankFused(nn.Module):
    """Some of queries, keys and values, one after the other, each a `LowRankLinear` of its own.

    It stands where one fused layer stood: (..., in_features) -> (..., out_features of all together).

    Args:
        parts: layers by name ("query", "key", "value"), in the order of their outputs.
    """

    def __init__(self, parts: dict[str, LowRankLinear]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to the outputs of all parts, beside each other."""
        return torch.cat([part(x) for part in self.children()], dim=-1)


class LowRankAttention(nn.Module):
    """Multi-head self-attention of low rank, (B, T, D) -> (B, T, D).

    Query, key and value are `LowRankLinear`, the output projection is a plain layer.

    Args:
        dim: features D of a token; a multiple of `num_heads`.
        num_heads: attention heads.
        rank: features between the factors; None is D / 2, with which the number of parameters is that of plain
            attention.
        bias: whether the four projections have biases.
        is_causal: whether a token sees only itself and those before it.

    Raises:
        ValueError: `dim` is no multiple of `num_heads`, or the rank is not 1 to `dim`.
    """

    def __init__(
        self, dim: int, num_heads: int, rank: int | None = None, *, bias: bool = True, is_causal: bool = False
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"expected a dim that is a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.query = LowRankLinear(dim, dim, rank, bias)
        self.key = LowRankLinear(dim, dim, rank, bias)
        self.value = LowRankLinear(dim, dim, rank, bias)
        self.out = nn.Linear(dim, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to every token, or to those before it; x and the result are (B, T, D)."""
        heads = (self.num_heads, -1)
        # (B, T, D) -> (B, T, H, E) -> (B, H, T, E), three times
        query = self.query(x).unflatten(-1, heads).transpose(1, 2)
        key = self.key(x).unflatten(-1, heads).transpose(1, 2)
        value = self.value(x).unflatten(-1, heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)  # (B, H, T, E)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended


@torch.no_grad()
def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factorise a matrix at a rank: the best approximation there is in Frobenius and spectral norm (Eckart–Young).

    The truncated singular value decomposition ``U S V^T``, with the root of S in either factor, which makes both
    equally large.

    Args:
        weight: (out, in), finite.
        rank: r, at most the smaller side.

    Returns:
        The second factor ``U sqrt(S)``, (out, r); the first, ``sqrt(S) V^T``, (r, in), both of the weight's dtype; and
        the relative error ``|W - product| / |W|`` in Frobenius norm, 0 of a zero weight.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    total = float(torch.linalg.vector_norm(values))
    error = float(torch.linalg.vector_norm(values[rank:])) / total if total else 0.0
    roots = values[:rank].sqrt()
    up, down = left[:, :rank] * roots, roots.unsqueeze(1) * right[:rank]
    return up.to(weight.dtype).contiguous(), down.to(weight.dtype).contiguous(), error
