"""TSMixer: layers over time and layers over channels in turn, without attention, as a baseline for forecasting.

Chen et al., "TSMixer: An All-MLP Architecture for Time Series Forecasting", TMLR 2023, arXiv 2303.06053. Every block
has layers of its own.

Shape letters: B batch, C channels, L look-back, H horizon, D features between the layers of feature mixing.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.models.forecast_model import ForecastModel

WindowNorm = Literal["batch", "layer"]


class Block(nn.Module):
    """Time mixing, then feature mixing, each after a norm and with a residual connection; (B, C, L) both ways."""

    def __init__(self, lookback: int, channels: int, dim: int, dropout: float, norm: WindowNorm) -> None:
        super().__init__()
        size = channels * lookback
        self.time_norm = nn.BatchNorm1d(size) if norm == "batch" else nn.LayerNorm(size)
        self.time = nn.Linear(lookback, lookback)
        self.feature_norm = nn.BatchNorm1d(size) if norm == "batch" else nn.LayerNorm(size)
        self.up = nn.Linear(channels, dim)
        self.down = nn.Linear(dim, channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; x and the result are (B, C, L)."""
        normalized = self.time_norm(x.flatten(1)).view_as(x)
        x = x + self.drop(F.relu(self.time(normalized)))
        normalized = self.feature_norm(x.flatten(1)).view_as(x).transpose(1, 2)  # (B, L, C)
        mixed = self.drop(self.down(self.drop(F.relu(self.up(normalized)))))  # (B, L, C) -> (B, L, D) -> (B, L, C)
        return x + mixed.transpose(1, 2)


class TSMixer(ForecastModel):
    """Blocks that mix steps, then channels, and one linear layer from L to H steps.

    Args:
        lookback: steps L of a window.
        horizon: steps H of a forecast.
        channels: series C.
        dim: features D between the two layers of feature mixing.
        depth: number of blocks.
        dropout: share of zeros behind each layer of a block, in training.
        norm: "batch", each of a window's C L values by its mean and variance over the batch, or "layer", each window
            by its own.
        revin: whether windows are normalised by `RevIN`.
        affine: whether that has learned gains and biases.
    """

    attends = False  # no attention for Watch to ask about

    def __init__(
        self,
        lookback: int,
        horizon: int,
        channels: int,
        *,
        dim: int = 16,
        depth: int = 2,
        dropout: float = 0.0,
        norm: WindowNorm = "batch",
        revin: bool = True,
        affine: bool = False,
    ) -> None:
        super().__init__(lookback, horizon, channels, revin=revin, affine=affine)
        self.blocks = nn.ModuleList(Block(lookback, channels, dim, dropout, norm) for _ in range(depth))
        self.head = nn.Linear(lookback, horizon)

    def forecast(self, x: Tensor) -> Tensor:
        """Map windows (B, C, L) to forecasts (B, C, H)."""
        for block in self.blocks:
            x = block(x)
        forecast: Tensor = self.head(x)
        return forecast
