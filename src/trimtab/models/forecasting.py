"""Every model that forecasts, from one config: look-back windows (B, C, L) in, forecasts (B, C, H) out.

Shape letters: B batch, C channels, L look-back, H horizon, D features.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from trimtab.attention.channel import Form
from trimtab.errors import RecipeError
from trimtab.models.dlinear import DLinear
from trimtab.models.forecast_model import ForecastModel
from trimtab.models.forecast_transformer import ForecastTransformer, Positions
from trimtab.models.itransformer import ITransformer
from trimtab.models.parts import Init, Norm, start_
from trimtab.models.samformer import SAMformer
from trimtab.models.tsmixer import TSMixer, WindowNorm

Kind = Literal["samformer", "transformer", "itransformer", "tsmixer", "dlinear"]


@dataclass(frozen=True)
class ForecastModelConfig:
    """What a model that forecasts is made of; as it stands, the SAMformer of Ilbert, Odonnat et al.

    A field counts for the kinds it names, and has no effect on the others.

    Attributes:
        kind: which model: "samformer"; "transformer", over time steps; "itransformer", over channels; "tsmixer"; or
            "dlinear".
        lookback: steps L that a model sees.
        horizon: steps H that it forecasts.
        channels: series C that it sees and forecasts together. In a recipe: None for as many as the data have.
        dim: features D: of all heads' queries in samformer, of a token in both Transformers, between the two layers of
            tsmixer's feature mixing.
        depth: blocks of both Transformers and of tsmixer.
        num_heads: attention heads of samformer and both Transformers; `dim` is a multiple of it.
        mlp_ratio: hidden features of both Transformers' MLP, in multiples of `dim`.
        dropout: share of zeros in what each part of a block adds, in both Transformers and tsmixer.
        norm: where the Transformers have LayerNorm: before each half of a block and after the last ("pre"), after each
            residual sum ("post"), or nowhere ("none"). None for "pre" in transformer, "post" in itransformer.
        positions: those of transformer, "learned" or "sinusoidal".
        form: of samformer's values: "factored", through `dim` features and back by W_O, as in its authors' main code,
            or "full", one L × L layer without W_O, as in their port to PyTorch.
        frozen_attention: whether samformer's attention stays as it is drawn, so that only its head is trained.
        window_norm: of tsmixer: "batch", every value of a window by its mean over the batch, or "layer", each window
            by itself.
        individual: whether dlinear has a layer for every channel.
        kernel: of dlinear's moving average, in steps; odd.
        revin: whether every window is normalised, and its forecast brought back, by `RevIN`.
        affine: whether `RevIN` has a learned gain and bias for every channel.
        init: where the weights of Linear layers start: PyTorch's own default ("torch"), N(0, init_std²) ("normal"), the
            same cut off at two standard deviations ("trunc_normal"), or Glorot's uniform ("xavier"). Biases start at
            zero, except with "torch".
        init_std: standard deviation for "normal" and "trunc_normal"; the other two do not use it.

    Raises:
        RecipeError: a field is out of range, or two of them do not fit together.
    """

    kind: Kind = "samformer"
    lookback: int = 512
    horizon: int = 96
    channels: int | None = None
    dim: int = 16
    depth: int = 2
    num_heads: int = 1
    mlp_ratio: int = 4
    dropout: float = 0.0
    norm: Norm | None = None
    positions: Positions = "learned"
    form: Form = "factored"
    frozen_attention: bool = False
    window_norm: WindowNorm = "batch"
    individual: bool = False
    kernel: int = 25
    revin: bool = True
    affine: bool = False
    init: Init = "torch"
    init_std: float = 0.02

    @property
    def least_batch(self) -> int:
        """The smallest batch that can be trained on: norms over a batch need two."""
        return 2 if self.kind == "tsmixer" and self.window_norm == "batch" else 1

    def __post_init__(self) -> None:
        for name in ("lookback", "horizon", "channels", "dim", "depth", "num_heads", "mlp_ratio", "kernel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} must be at least 1, got {value}")
        choices = {"kind": Kind, "positions": Positions, "form": Form, "window_norm": WindowNorm, "init": Init}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise RecipeError(f"{name} must be one of {', '.join(get_args(choice))}; got {getattr(self, name)!r}")
        if self.norm is not None and self.norm not in get_args(Norm):
            raise RecipeError(f"norm must be one of {', '.join(get_args(Norm))}, or None; got {self.norm!r}")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not 0 < self.init_std < float("inf"):
            raise RecipeError(f"init_std must be a positive number, got {self.init_std}")
        if self.kernel % 2 == 0:
            raise RecipeError(f"kernel must be odd, so that the moving average has a middle; got {self.kernel}")
        if self.dim % self.num_heads:
            raise RecipeError(
                f"dim {self.dim} is not a multiple of num_heads {self.num_heads}; heads are all of one size"
            )
        if self.kind == "samformer" and self.form == "full" and self.lookback % self.num_heads:
            raise RecipeError(
                f"the full form shares its L values among the heads: lookback {self.lookback} is not a multiple of "
                f"num_heads {self.num_heads}"
            )
        if self.kind == "transformer" and self.positions == "sinusoidal" and self.dim % 2:
            raise RecipeError(f"dim must be even, for sinusoidal positions of a sine and a cosine each; got {self.dim}")


def make_forecast_model(config: ForecastModelConfig) -> nn.Module:
    """Draw the model of a config, from the global random number generator: seed it for the same model again.

    Returns:
        A module that maps windows (B, C, L) to forecasts (B, C, H).

    Raises:
        RecipeError: the config has no `channels`.
    """
    if config.channels is None:
        raise RecipeError("a model that forecasts needs its channels: how many series there are")
    kind, names = _MODELS[config.kind]
    options = {name: getattr(config, name) for name in (*names, "revin", "affine")} | _norm(config)
    model: nn.Module = kind(config.lookback, config.horizon, config.channels, **options)
    for module in model.modules():
        start_(module, config.init, config.init_std)
    return model


_TRANSFORMER = ("dim", "depth", "num_heads", "mlp_ratio", "dropout")
_MODELS: dict[Kind, tuple[type[ForecastModel], tuple[str, ...]]] = {
    "samformer": (SAMformer, ("dim", "num_heads", "form", "frozen_attention")),
    "transformer": (ForecastTransformer, (*_TRANSFORMER, "positions")),
    "itransformer": (ITransformer, _TRANSFORMER),
    "tsmixer": (TSMixer, ("dim", "depth", "dropout")),
    "dlinear": (DLinear, ("kernel", "individual")),
}
"""Of each kind its class, and the fields of the config that it takes under the same name."""


def _norm(config: ForecastModelConfig) -> dict[str, str]:
    """The argument `norm` of the kinds that have one."""
    if config.kind == "tsmixer":
        return {"norm": config.window_norm}
    usual = {"transformer": "pre", "itransformer": "post"}
    return {"norm": config.norm or usual[config.kind]} if config.kind in usual else {}
