"""What is measured of gradients."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from trimtab.watch.signals.norms import norms


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float | None:
    """L2 norm of all gradients together; None without gradients. Of sharded ones every process must ask."""
    found = norms([p.grad for p in parameters if p.grad is not None and not p.grad.is_meta])
    return torch.linalg.vector_norm(found).item() if len(found) else None


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
