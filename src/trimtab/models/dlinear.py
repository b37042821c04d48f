"""DLinear: a moving average and what it leaves over, each mapped by one linear layer; a baseline for forecasting.

Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023, arXiv 2205.13504.

Shape letters: B batch, C channels, L look-back, H horizon.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.models.forecast_model import ForecastModel


class DLinear(ForecastModel):
    """``W_t trend + W_s (x - trend)``, with one pair of layers for all channels or one for each.

    Args:
        lookback: steps L of a window.
        horizon: steps H of a forecast.
        channels: series C.
        kernel: steps of the moving average; odd.
        individual: whether every channel has layers of its own.
        revin: whether windows are normalised by `RevIN`; the paper has none.
        affine: whether that has learned gains and biases.

    Raises:
        ValueError: `kernel` is not odd and positive.
    """

    attends = False  # no attention for Watch to ask about

    def __init__(
        self,
        lookback: int,
        horizon: int,
        channels: int,
        *,
        kernel: int = 25,
        individual: bool = False,
        revin: bool = False,
        affine: bool = False,
    ) -> None:
        super().__init__(lookback, horizon, channels, revin=revin, affine=affine)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"expected an odd kernel, so that the moving average has a middle; got {kernel}")
        self.kernel = kernel
        layers = channels if individual else 1
        self.trend = nn.ModuleList(nn.Linear(lookback, horizon) for _ in range(layers))
        self.seasonal = nn.ModuleList(nn.Linear(lookback, horizon) for _ in range(layers))

    def forecast(self, x: Tensor) -> Tensor:
        """Map windows (B, C, L) to forecasts (B, C, H)."""
        trend = moving_average(x, self.kernel)
        return _map(self.trend, trend) + _map(self.seasonal, x - trend)


def moving_average(x: Tensor, kernel: int) -> Tensor:
    """Mean of the `kernel` steps around each step of x (B, C, L); beyond its ends a series keeps its last value."""
    return F.avg_pool1d(F.pad(x, (kernel // 2, kernel // 2), mode="replicate"), kernel, stride=1)


def _map(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """Map (B, C, L) to (B, C, H) by one layer, or by one for each channel."""
    if len(layers) == 1:
        mapped: Tensor = layers[0](x)
        return mapped
    return torch.stack([layer(series) for layer, series in zip(layers, x.unbind(1), strict=True)], dim=1)
