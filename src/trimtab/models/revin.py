"""RevIN: each window is normalised before a model sees it, and the forecast is brought back.

Kim et al., "Reversible Instance Normalization for Accurate Time-Series Forecasting against Distribution Shift",
ICLR 2022.

Shape letters: B batch, C channels, L look-back, H horizon.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

_LEAST_GAIN = 1e-2


class Statistics(NamedTuple):
    """Level and spread of every channel of every window, (B, C, 1) each, in float32 or float64."""

    mean: Tensor
    std: Tensor


class RevIN(nn.Module):
    """Reversible instance normalisation of (B, C, steps), by the level and spread of each channel of each window.

    ``gain (x - mean) / std + bias`` and back, with ``std = sqrt(variance + eps)``. Nothing of a window stays on the
    module: `normalize` returns the statistics, and `denormalize` takes them.

    - A flat series has a spread of sqrt(eps): it becomes zeros, exactly, and comes back to its level, exactly.
    - NaN is a missing value. Level and spread are those of the values present, and a missing one counts as the level:
      zero, once normalised. A channel of which nothing is present counts as flat at zero, which for standardised data
      is the mean of the training part.
    - A gain below 0.01 in size is used as 0.01, of its sign, in both directions: so the way back multiplies by 100 at
      most, and undoes the way there. Its gradient goes on as if it were used as it is, so that it can grow again.

    Args:
        channels: series C.
        affine: whether there are a learned `gain` and `bias` for every channel, (C,), which start at 1 and 0.
        eps: added to the variance, in the squared units of the series.
    """

    def __init__(self, channels: int, affine: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.gain = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor, forecast: Callable[[Tensor], Tensor]) -> Tensor:
        """Normalise x (B, C, L), forecast, and bring (B, C, H) back, in the dtype of x."""
        normalized, statistics = self.normalize(x)
        return self.denormalize(forecast(normalized), statistics).to(x.dtype)

    def normalize(self, x: Tensor) -> tuple[Tensor, Statistics]:
        """Normalise windows.

        Args:
            x: (B, C, L), floating point; NaN where a value is missing.

        Returns:
            The normalised windows, (B, C, L), in the dtype of `x`, and what brings them back.

        Raises:
            ValueError: `x` has another shape.
        """
        self._expect_channels(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        missing = _missing(wide)
        count: int | Tensor = x.shape[-1]
        anchor = wide[..., :1]
        if missing is not None:
            count = (~missing).sum(-1, keepdim=True).clamp_min(1)
            first = (~missing).to(torch.uint8).argmax(-1, keepdim=True)  # that is present
            anchor = wide.gather(-1, first).masked_fill(missing.all(-1, keepdim=True), 0.0)
            wide = torch.where(missing, anchor, wide)
        # Around a value of the window, so that the mean of a flat series is that value and not a rounding beside it.
        mean = anchor + (wide - anchor).sum(-1, keepdim=True) / count
        centred = wide - mean if missing is None else (wide - mean).masked_fill(missing, 0.0)
        std = (centred.square().sum(-1, keepdim=True) / count + self.eps).sqrt()
        normalized = centred / std
        if self.gain is not None and self.bias is not None:
            normalized = normalized * self._gain_in_use() + self.bias.unsqueeze(-1)
        return normalized.to(x.dtype), Statistics(mean, std)

    def denormalize(self, forecast: Tensor, statistics: Statistics) -> Tensor:
        """Bring forecasts (B, C, H) back, by the statistics of their windows.

        Raises:
            ValueError: `forecast` has another shape.
        """
        self._expect_channels(forecast)
        if self.gain is not None and self.bias is not None:
            forecast = (forecast - self.bias.unsqueeze(-1)) / self._gain_in_use()
        return torch.addcmul(statistics.mean, forecast, statistics.std)

    def _gain_in_use(self) -> Tensor:
        assert self.gain is not None
        floored = torch.copysign(self.gain.abs().clamp_min(_LEAST_GAIN), self.gain)
        return (self.gain + (floored - self.gain).detach()).unsqueeze(-1)  # (C, 1)

    def _expect_channels(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[1] != self.channels:
            raise ValueError(f"expected shape (B, {self.channels} channels, steps), got {tuple(x.shape)}")


def _missing(x: Tensor) -> Tensor | None:
    """Return where values are missing, (B, C, L), bool; None where they are known not to be.

    To know costs one sum, and saves most of the time of normalising. But not on GPUs, which would wait for the answer,
    nor where code is traced for any input.
    """
    traced = torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None
    if x.device.type == "cpu" and not traced and not bool(x.detach().sum().isnan()):
        return None
    return x.isnan()
