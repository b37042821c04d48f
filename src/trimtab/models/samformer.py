"""SAMformer: one attention over channels and one linear layer over time, trained with sharpness-aware minimisation.

Ilbert, Odonnat et al., "SAMformer: Unlocking the Potential of Transformers in Time Series Forecasting with
Sharpness-Aware Minimization and Channel-Wise Attention", ICML 2024, arXiv 2402.10198. Trained without, it is the
paper's "Transformer"; with `frozen_attention`, its "Random Transformer".

Shape letters: B batch, C channels, L look-back, H horizon, D features of all heads' queries.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.attention.channel import ChannelAttention, Form
from trimtab.models.forecast_model import ForecastModel
from trimtab.reparam import effective_weight
from trimtab.reparam.carried import is_sharded
from trimtab.reparam.classes import plain_class_of


class SAMformer(ForecastModel):
    """RevIN, channel attention with a residual connection, one linear layer from L to H steps, and RevIN back.

    In the full form ``(A X W_V + X) W_H = A (X (W_V W_H)) + X W_H``: where that is the cheaper order, value and head
    are multiplied first, so that no value of L steps is ever made. It is the same function, with the same gradients.

    Args:
        lookback: steps L of a window.
        horizon: steps H of a forecast.
        channels: series C.
        dim: features D of queries and keys, and in the factored form of values.
        num_heads: attention heads.
        form: of the values: "factored", as in the authors' main code, or "full", as in their port to PyTorch; see
            `ChannelAttention`.
        frozen_attention: whether the attention stays as it is drawn.
        revin: whether windows are normalised by `RevIN`.
        affine: whether that has learned gains and biases.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        channels: int,
        *,
        dim: int = 16,
        num_heads: int = 1,
        form: Form = "factored",
        frozen_attention: bool = False,
        revin: bool = True,
        affine: bool = False,
    ) -> None:
        super().__init__(lookback, horizon, channels, revin=revin, affine=affine)
        self.attention = ChannelAttention(lookback, dim, num_heads, form).requires_grad_(not frozen_attention)
        self.head = nn.Linear(lookback, horizon)

    def forecast(self, x: Tensor) -> Tensor:
        """Map windows (B, C, L) to forecasts (B, C, H)."""
        value, head = self.attention.value, self.head
        if not self._multiplies_first(len(x)):
            forecast: Tensor = head(x + self.attention(x))
            return forecast
        head_weight = effective_weight(head)  # (H, L)
        # Through the attention's own forward, where a soft cap and whoever watches find it. The value's bias goes with
        # the values, as it does one after the other.
        bias = None if value.bias is None else F.linear(value.bias, head_weight)
        values = F.linear(x, head_weight @ effective_weight(value), bias)  # (B, C, H)
        return self.attention(x, values) + F.linear(x, head_weight, head.bias)

    def _multiplies_first(self, batch: int) -> bool:
        """Whether the product of value and head is used: it exists, and saves multiplications.

        With R = B C rows, value and head take R L (L + H) of them one after the other, and H L L + 2 R L H otherwise.
        """
        attention, rows = self.attention, batch * self.channels
        if rows * (self.lookback - self.horizon) <= self.horizon * self.lookback:
            return False
        one_product = attention.num_heads == 1 and isinstance(attention.out, nn.Identity)
        return one_product and _is_only_a_weight(attention.value) and _is_only_a_weight(self.head)


def _is_only_a_weight(layer: nn.Module) -> bool:
    """Say whether a layer is nn.Linear, plain or under sigma-Reparam, whole on this process, with nothing hung on it.

    What else may stand there (weight norm, factors of low rank, LoRA, the hook of a soft cap) has its say in its own
    forward. Hooks that only look, as `trimtab.Watch` has, count for nothing, so that watching changes nothing.
    """
    if plain_class_of(layer) is not nn.Linear or not isinstance(layer, nn.Linear) or "forward" in layer.__dict__:
        return False
    kinds = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    hooks = [hook for kind in kinds for hook in kind.values()]
    return all(getattr(hook, "only_looks", False) for hook in hooks) and not is_sharded(layer.weight)
