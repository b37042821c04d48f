"""The baselines that cost nothing: the last value, and the last season.

Hyndman & Athanasopoulos, "Forecasting: Principles and Practice", 3rd edition, section 5.2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.errors import RecipeError
from trimtab.tasks.task import Examples

_WINDOWS = 32  # at a time


def last_value(x: Tensor, horizon: int) -> Tensor:
    """The last value, again and again: (B, C, L) -> (B, C, H)."""
    return x[..., -1:].expand(*x.shape[:-1], horizon)


def last_season(x: Tensor, horizon: int, season: int) -> Tensor:
    """The last season, again and again: (B, C, L) -> (B, C, H).

    Args:
        x: what is seen.
        horizon: steps H to forecast.
        season: steps of a season, from 1 to L.

    Raises:
        RecipeError: what is seen is shorter than a season.
    """
    if not 1 <= season <= x.shape[-1]:
        raise RecipeError(f"a season must be from 1 step to what is seen, {x.shape[-1]}; got {season}")
    return x[..., x.shape[-1] - season + torch.arange(horizon, device=x.device) % season]


def errors(forecast: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of each window the mean squared and absolute error over its columns and steps, "mse" and "mae", (B,).

    Args:
        forecast: from what is seen to what comes then.
        x: what is seen, (B, C, L).
        y: what came, (B, C, H).
    """
    error = forecast(x) - y
    return {"mse": error.square().mean(dim=(1, 2)), "mae": error.abs().mean(dim=(1, 2))}


@torch.no_grad()
def measure(forecast: Callable[[Tensor], Tensor], examples: Examples) -> dict[str, float]:
    """The mean of `errors` over all windows.

    Args:
        forecast: from what is seen, (B, C, L), to what comes then, (B, C, H).
        examples: of `trimtab.tasks.forecasting.windows.windows`.
    """
    totals: dict[str, Tensor] = {}
    generator = torch.Generator()
    for indices in torch.arange(examples.size).split(_WINDOWS):
        for name, each in errors(forecast, *examples.batch(indices, generator)).items():
            totals[name] = totals.get(name, torch.zeros(())) + each.double().sum()
    return {name: total.item() / examples.size for name, total in totals.items()}
