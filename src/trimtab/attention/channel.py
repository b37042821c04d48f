"""Channel-wise attention: every series is a token, and its look-back the token's features.

Ilbert, Odonnat et al., "SAMformer", ICML 2024, arXiv 2402.10198, equation (2) and the released code.

Shape letters: B batch, C channels, L look-back, D features of all heads' queries.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["factored", "full"]


class ChannelAttention(nn.Module):
    """Attention over the C channels of a window, (B, C, L) -> (B, C, L), without masks or positions.

    ``softmax(Q K^T / sqrt(d)) V``, with queries Q and keys K of D features, d = D / num_heads of them in each head, and
    a (B, C, C) matrix of weights for each. Query, key, value and output are plain Linear layers, so that each has a
    spectral norm of its own.

    Args:
        lookback: steps L of a window.
        dim: features D of queries and keys; a multiple of `num_heads`.
        num_heads: attention heads.
        form: of the values: "factored", of D features, which `out` maps back to L steps; or "full", of L steps by one
            L × L layer, and no `out`.
        bias: whether the layers have biases.

    Raises:
        ValueError: `dim`, or `lookback` in the full form, is no multiple of `num_heads`, or `form` is unknown.
    """

    def __init__(
        self, lookback: int, dim: int = 16, num_heads: int = 1, form: Form = "factored", bias: bool = True
    ) -> None:
        super().__init__()
        if form not in ("factored", "full"):
            raise ValueError(f"form must be factored or full; got {form!r}")
        width = dim if form == "factored" else lookback
        if num_heads < 1 or dim % num_heads or width % num_heads:
            raise ValueError(
                f"expected a dim, and in the full form a lookback, that is a multiple of num_heads; got dim {dim}, "
                f"lookback {lookback} and num_heads {num_heads}"
            )
        self.lookback, self.num_heads = lookback, num_heads
        self.query = nn.Linear(lookback, dim, bias)
        self.key = nn.Linear(lookback, dim, bias)
        self.value = nn.Linear(lookback, width, bias)
        self.out = nn.Linear(dim, lookback, bias) if form == "factored" else nn.Identity()

    def forward(self, x: Tensor, values: Tensor | None = None) -> Tensor:
        """Attend from every channel to every channel.

        Args:
            x: (B, C, L).
            values: what is mixed, (B, C, W) with a multiple W of `num_heads`, in place of what `value` makes of `x`;
                `out` is then left out, too.

        Returns:
            (B, C, L); (B, C, W) if there are values.

        Raises:
            ValueError: `x` or `values` has another shape.
        """
        if x.ndim != 3 or x.shape[-1] != self.lookback:
            raise ValueError(f"expected x of shape (B, C, {self.lookback} steps of look-back), got {tuple(x.shape)}")
        if values is not None and (values.shape[:-1] != x.shape[:-1] or values.shape[-1] % self.num_heads):
            raise ValueError(
                f"expected values of shape {tuple(x.shape[:-1])} and a multiple of {self.num_heads} features, got "
                f"{tuple(values.shape)}"
            )
        heads = (self.num_heads, -1)
        # (B, C, D) -> (B, C, heads, d) -> (B, heads, C, d), three times
        query = self.query(x).unflatten(-1, heads).transpose(1, 2)
        key = self.key(x).unflatten(-1, heads).transpose(1, 2)
        value = (self.value(x) if values is None else values).unflatten(-1, heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # (B, C, width)
        return mixed if values is not None else self.out(mixed)
