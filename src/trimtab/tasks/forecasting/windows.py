"""Windows on a series: what the model sees, and what comes after it."""

import torch
from torch import Tensor

from trimtab.tasks.task import Examples


def window_view(values: Tensor, width: int) -> Tensor:
    """All windows of a series, one beginning at each step: (C, T) -> (T - width + 1, C, width), in the same memory."""
    return values.unfold(1, width, 1).transpose(0, 1)


def windows(values: Tensor, begin: int, end: int, lookback: int, horizon: int) -> Examples:
    """The windows whose forecast lies from `begin` to before `end`, one at each step.

    What the model sees may lie before `begin`: the first of them forecasts `begin` itself. Nothing is copied but the
    windows of a batch, so that memory does not depend on `lookback` and `horizon`.

    Args:
        values: (C, T), scaled.
        begin: the first step that is forecast, at least `lookback`.
        end: the step after the last.
        lookback: steps L that the model sees.
        horizon: steps H that it forecasts, at most `end - begin`.

    Returns:
        Examples whose batch is what is seen, (B, C, L), and what comes then, (B, C, H).
    """
    view = window_view(values[:, begin - lookback : end], lookback + horizon)
    seen, ahead = view[..., :lookback], view[..., lookback:]

    def batch(indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # along the first dimension; along the second, index_select would copy the whole view first
        return seen.index_select(0, indices), ahead.index_select(0, indices)

    return Examples(len(view), batch)
