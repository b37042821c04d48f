"""A Transformer over the time steps of a window, as a baseline for forecasting; made to be read in one sitting.

Vaswani et al., "Attention Is All You Need", arXiv 1706.03762: the encoder alone, on tokens that are time steps. Query,
key, value and output are four plain Linear layers, so that each has a spectral norm of its own.

Shape letters: B batch, C channels, L look-back, H horizon, T tokens, D features of a token.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.models.encoder_decoder import sinusoids
from trimtab.models.forecast_model import ForecastModel
from trimtab.models.parts import MLP, Norm, layer_norm

Positions = Literal["learned", "sinusoidal"]


class Attention(nn.Module):
    """Multi-head self-attention over T tokens, (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to every token; x and the result are (B, T, D)."""
        heads = (self.num_heads, -1)
        # (B, T, D) -> (B, T, heads, D / heads) -> (B, heads, T, D / heads), three times
        query = self.query(x).unflatten(-1, heads).transpose(1, 2)
        key = self.key(x).unflatten(-1, heads).transpose(1, 2)
        value = self.value(x).unflatten(-1, heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended


class Block(nn.Module):
    """Attention, then MLP, each with a residual connection and its norm where `norm` puts it; (B, T, D) both ways."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.post_norm = norm == "post"
        self.attention_norm = layer_norm(norm, dim)
        self.attention = Attention(dim, num_heads)
        self.mlp_norm = layer_norm(norm, dim)
        self.mlp = MLP(dim, mlp_ratio * dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; x and the result are (B, T, D)."""
        if self.post_norm:
            x = self.attention_norm(x + self.drop(self.attention(x)))
            return self.mlp_norm(x + self.drop(self.mlp(x)))
        x = x + self.drop(self.attention(self.attention_norm(x)))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class ForecastTransformer(ForecastModel):
    """Every time step is a token of its C values; what comes out is read as C values a step, and mapped to H steps.

    The last layer goes from L to H steps and is shared by the channels, as in the other models here.

    Args:
        lookback: steps L of a window.
        horizon: steps H of a forecast.
        channels: series C.
        dim: features D of a token; a multiple of `num_heads`, and even with sinusoidal positions.
        depth: number of blocks.
        num_heads: attention heads in each block.
        mlp_ratio: hidden features of the MLP, in multiples of `dim`.
        dropout: share of zeros in the tokens before the first block, and in what each half of a block adds.
        norm: LayerNorm before each half of a block and after the last ("pre"), after each residual sum ("post"), or
            nowhere ("none").
        positions: what is added to the tokens: a "learned" embedding, or "sinusoidal" positions.
        revin: whether windows are normalised by `RevIN`.
        affine: whether that has learned gains and biases.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        channels: int,
        *,
        dim: int = 16,
        depth: int = 2,
        num_heads: int = 1,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        norm: Norm = "pre",
        positions: Positions = "learned",
        revin: bool = True,
        affine: bool = False,
    ) -> None:
        super().__init__(lookback, horizon, channels, revin=revin, affine=affine)
        self.embedding = nn.Linear(channels, dim)
        if positions == "learned":
            self.position = nn.Parameter(torch.empty(lookback, dim))
            nn.init.normal_(self.position, std=0.02)
        else:
            self.register_buffer("position", sinusoids(0, lookback, dim), persistent=False)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, dropout, norm) for _ in range(depth))
        # after post-norm blocks the tokens are normalised already
        self.norm = layer_norm(norm, dim) if norm == "pre" else nn.Identity()
        self.readout = nn.Linear(dim, channels)
        self.head = nn.Linear(lookback, horizon)

    def forecast(self, x: Tensor) -> Tensor:
        """Map windows (B, C, L) to forecasts (B, C, H)."""
        tokens = self.drop(self.embedding(x.transpose(1, 2)) + self.position)  # (B, C, L) -> (B, L, C) -> (B, L, D)
        for block in self.blocks:
            tokens = block(tokens)
        steps = self.readout(self.norm(tokens)).transpose(1, 2)  # (B, L, D) -> (B, L, C) -> (B, C, L)
        forecast: Tensor = self.head(steps)
        return forecast
