"""The toy problem of SAMformer (Ilbert, Odonnat et al., arXiv 2402.10198): a linear map, and noise.

    Y = X W + e,  with X (C, L), W (L, H) and e (C, H) all independent from N(0, 1)

What is best, X W, has a mean squared error of 1; zero has one of L + 1. Each example is drawn for itself: there is no
series that they are windows of.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.errors import DataError
from trimtab.tasks.data import prepared
from trimtab.tasks.forecasting.parts import Parts
from trimtab.tasks.task import Examples

CHANNELS = 7
SIZES = (10_000, 5_000, 2_000)
"""Examples for training, validation and test."""
BAYES_MSE = 1.0

_FORMAT = "1"  # of what is drawn here
_AT_A_TIME = 500  # examples


def is_toy(data: str) -> bool:
    """Whether a name is that of the toy problem: "toy", or "toy:SEED"."""
    return data.partition(":")[0] == "toy"


def toy_parts(data: str, lookback: int, horizon: int, sizes: Sequence[int] = SIZES, channels: int = CHANNELS) -> Parts:
    """The toy problem, drawn once and memory-mapped from then on: 290 MB for 512 and 96 steps.

    Args:
        data: "toy", or "toy:SEED" for another map and other examples than those of seed 0.
        lookback: L.
        horizon: H.
        sizes: examples for training, validation and test.
        channels: C.

    Raises:
        DataError: the seed is no whole number.
    """
    text = data.partition(":")[2] or "0"
    if not text.isdecimal():
        raise DataError(f"the toy problem is toy, or toy:SEED with a whole number; got {data!r}")
    seed = int(text)
    shape = (sum(sizes), channels, lookback, horizon)
    arrays = prepared("toy", [_FORMAT, str(seed), *map(str, shape)], lambda: _draw(seed, *shape))
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    ends = np.cumsum(sizes).tolist()

    def examples(first: int, end: int) -> Examples:
        def batch(indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return x[first:end].index_select(0, indices), y[first:end].index_select(0, indices)

        return Examples(end - first, batch)

    train, validation, test = (examples(first, end) for first, end in zip([0, *ends[:-1]], ends, strict=True))
    facts = {"windows": dict(zip(("train", "validation", "test"), sizes, strict=True)), "bayes_mse": BAYES_MSE}
    return Parts(channels, train, validation, test, facts=facts)


def _draw(seed: int, size: int, channels: int, lookback: int, horizon: int) -> dict[str, NDArray[np.float32]]:
    random = np.random.Generator(np.random.PCG64(seed))
    weight = random.standard_normal((lookback, horizon), np.float32)
    x = np.empty((size, channels, lookback), np.float32)
    y = np.empty((size, channels, horizon), np.float32)
    for first in range(0, size, _AT_A_TIME):
        some = slice(first, first + _AT_A_TIME)
        random.standard_normal(out=x[some], dtype=np.float32)
        random.standard_normal(out=y[some], dtype=np.float32)
        y[some] += x[some] @ weight
    return {"x": x, "y": y, "weight": weight}
