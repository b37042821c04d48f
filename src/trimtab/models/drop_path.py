"""Stochastic depth: in training, a residual branch is left out of some examples."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """What a residual branch adds, x of (B, ...), set to zero for each example with probability `rate`.

    Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382. What is kept is divided by 1 - rate, so that
    the mean is x and nothing changes in eval mode. A rate of zero draws no random number.

    Our own, because those of Trimtab's dependencies lie inside their models (kornia's comes with all of kornia), and a
    ViT needs nothing but torch.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop or keep each example of x, (B, ...), as a whole."""
        if not self.training or self.rate == 0:
            return x
        # drawn in float32, as in bfloat16 probabilities are rounded to a few hundredths
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return torch.where(kept, x / (1 - self.rate), 0.0)

    def extra_repr(self) -> str:
        """Tell the rate."""
        return f"rate={self.rate:.3g}"
