"""What every model that forecasts has in common: the check of its windows, and RevIN around it.

Shape letters: B batch, C channels, L look-back, H horizon.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from trimtab.models.revin import RevIN


class ForecastModel(nn.Module, ABC):
    """Look-back windows (B, C, L) in, forecasts (B, C, H) out; what is between them is a subclass's `forecast`.

    Args:
        lookback: steps L of a window.
        horizon: steps H of a forecast.
        channels: series C.
        revin: whether windows are normalised, and forecasts brought back, by `RevIN`.
        affine: whether that has a learned gain and bias for every channel.
    """

    def __init__(self, lookback: int, horizon: int, channels: int, *, revin: bool, affine: bool) -> None:
        super().__init__()
        self.lookback, self.horizon, self.channels = lookback, horizon, channels
        self.revin = RevIN(channels, affine) if revin else None

    def forward(self, x: Tensor) -> Tensor:
        """Forecast.

        Args:
            x: (B, C, L), floating point. NaN is a missing value for `RevIN`; without it, missing values come out as
                NaN.

        Returns:
            (B, C, H), in the units of `x`.

        Raises:
            ValueError: `x` has another shape, or is not floating point.
        """
        if x.shape[1:] != (self.channels, self.lookback) or not x.is_floating_point():
            raise ValueError(
                f"expected floating-point windows of shape (B, {self.channels} channels, {self.lookback} steps of "
                f"look-back), got {x.dtype} of {tuple(x.shape)}"
            )
        return self.forecast(x) if self.revin is None else self.revin(x, self.forecast)

    @abstractmethod
    def forecast(self, x: Tensor) -> Tensor:
        """Map windows (B, C, L) to forecasts (B, C, H), in whatever units they come."""
