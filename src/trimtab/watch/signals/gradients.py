"""What is measured of gradients."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from trimtab.spectral.norms import norms, sums


class Moments(NamedTuple):
    """Moments of the entries of some gradients.

    Attributes:
        entries: how many.
        total: their sum.
        square: the sum of their squares.
    """

    entries: int
    total: float
    square: float

    @property
    def variance(self) -> float:
        """Mean of the squares less the square of the mean, as of a whole population; never below 0."""
        return max(self.square / self.entries - (self.total / self.entries) ** 2, 0.0) if self.entries else math.nan

    def plus(self, other: "Moments") -> "Moments":
        """Those of both gradients' entries together."""
        return Moments(self.entries + other.entries, self.total + other.total, self.square + other.square)

    def divided(self, scale: float) -> "Moments":
        """Those of the entries divided by a number."""
        return Moments(self.entries, self.total / scale, self.square / scale**2)


def gradient_moments(parameters: Mapping[str, nn.Parameter]) -> dict[str, Moments]:
    """Moments of the entries of each parameter's gradient, by its name; without a gradient, no moments.

    Of sharded ones every process must ask, and is told of the whole.
    """
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None and not p.grad.is_meta}
    squares = norms(list(found.values())).square().tolist()
    totals = sums(list(found.values())).tolist()
    return {
        name: Moments(gradient.numel(), total, square)
        for (name, gradient), total, square in zip(found.items(), totals, squares, strict=True)
    }


def gradient_norm(moments: Mapping[str, Moments]) -> float | None:
    """L2 norm of all these gradients together; None without any."""
    return math.sqrt(sum(each.square for each in moments.values())) if moments else None


def gradient_variances(moments: Mapping[str, Moments], layer_of: Callable[[str], str]) -> dict[str, float]:
    """Variance over all entries of the gradients of each layer.

    Chung et al. (EMNLP 2024, arXiv 2409.07787) speak of the variance of gradients by layer; this is the one that costs
    no second gradient. How much gradients differ from one batch to the next is `gradient_noise`.

    Args:
        moments: by the name of the parameter.
        layer_of: the layer of a parameter, by their names.
    """
    by_layer: dict[str, Moments] = {}
    for name, each in moments.items():
        layer = layer_of(name)
        by_layer[layer] = by_layer[layer].plus(each) if layer in by_layer else each
    return {layer: each.variance for layer, each in by_layer.items()}


class GradientNoise(NamedTuple):
    """How much gradients differ from one part of a batch to the next.

    Attributes:
        variance: unbiased estimate of the trace of the covariance of one part's gradient.
        signal: unbiased estimate of the squared norm of the true gradient; noisy, and negative at times.
    """

    variance: float
    signal: float

    @property
    def scale(self) -> float:
        """The simple noise scale, variance / signal: the batch size, in parts, at which noise and signal balance.

        Of single readings it is biased and wild; read it off averages (`averaged`), where it is a ratio of moving
        averages. NaN where the signal is not positive: then the noise hides it.
        """
        return self.variance / self.signal if self.signal > 0 else float("nan")


def gradient_noise(mean_square_of_parts: float, square_of_mean: float, parts: int) -> GradientNoise:
    """Gradient variance and signal from the gradients of equal parts of a batch.

    McCandlish et al., arXiv 1812.06162, appendix A.1, in units of parts. With part gradients y_1 ... y_n of mean G,
    ``E|y|² = signal + variance`` and ``E|G|² = signal + variance / n``, so that

        variance = n / (n - 1) · (mean |y|² - |G|²)        signal = (n |G|² - mean |y|²) / (n - 1)

    The parts are micro-batches (gradient accumulation), processes (data parallel), or both.

    Args:
        mean_square_of_parts: mean of the squared norms of the parts' gradients, ``mean |y|²``.
        square_of_mean: squared norm of the mean of these gradients, ``|G|²``.
        parts: n, how many there are.

    Raises:
        ValueError: if there are fewer than two parts, which say nothing of how they differ.
    """
    if parts < 2:
        raise ValueError(f"expected at least 2 parts of a batch, got {parts}: one gradient alone has no variance")
    variance = (mean_square_of_parts - square_of_mean) * parts / (parts - 1)
    return GradientNoise(variance, (parts * square_of_mean - mean_square_of_parts) / (parts - 1))


def averaged(before: GradientNoise | None, now: GradientNoise, decay: float = 0.9) -> GradientNoise:
    """Exponential moving averages of variance and signal, each on its own, as the noise scale needs them.

    Args:
        before: the averages so far; None at the first reading.
        now: the new reading.
        decay: weight of the averages so far, 0 to 1. A first reading counts in full.
    """
    if before is None:
        return now
    return GradientNoise(*(decay * old + (1 - decay) * new for old, new in zip(before, now, strict=True)))
