"""iTransformer: a Transformer whose tokens are whole series, as a baseline for forecasting.

Liu et al., "iTransformer: Inverted Transformers Are Effective for Time Series Forecasting", ICLR 2024,
arXiv 2310.06625. Without time stamps as further tokens; with `RevIN` for its instance normalisation.

Shape letters: B batch, C channels (the tokens), L look-back, H horizon, D features of a token.
"""

from torch import Tensor, nn

from trimtab.models.forecast_model import ForecastModel
from trimtab.models.forecast_transformer import Block
from trimtab.models.parts import Norm, layer_norm


class ITransformer(ForecastModel):
    """The L steps of each channel are embedded as one token of D features; blocks mix the channels; D to H steps.

    Args:
        lookback: steps L of a window.
        horizon: steps H of a forecast.
        channels: series C.
        dim: features D of a token; a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads in each block.
        mlp_ratio: hidden features of the MLP, in multiples of `dim`.
        dropout: share of zeros in the tokens before the first block, and in what each half of a block adds.
        norm: LayerNorm after each residual sum ("post", as in the paper), before each half of a block ("pre"), or
            nowhere ("none"). Unless there is none, there is one more after the last block.
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
        depth: int = 2,
        num_heads: int = 1,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        norm: Norm = "post",
        revin: bool = True,
        affine: bool = False,
    ) -> None:
        super().__init__(lookback, horizon, channels, revin=revin, affine=affine)
        self.embedding = nn.Linear(lookback, dim)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, dropout, norm) for _ in range(depth))
        self.norm = layer_norm(norm, dim)
        self.head = nn.Linear(dim, horizon)

    def forecast(self, x: Tensor) -> Tensor:
        """Map windows (B, C, L) to forecasts (B, C, H)."""
        tokens = self.drop(self.embedding(x))  # (B, C, L) -> (B, C, D)
        for block in self.blocks:
            tokens = block(tokens)
        forecast: Tensor = self.head(self.norm(tokens))
        return forecast
