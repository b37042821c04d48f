"""The arms of forecasting.py: models, stabilizers, the settings that each is tuned over, and what has been published.

Every arm has six settings, found in two strokes: four values of what matters most to it, then two more of the next at
the best of these. Learning rates are multiples of the published one, 1e-3, and 1e-4 for the weather.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.models.forecasting import ForecastModelConfig
from trimtab.tasks.forecasting import ForecastingRecipe
from trimtab.tasks.forecasting.recipes import published

HORIZONS = (96, 192, 336, 720)
SEEDS = {"ETTh1": 5, "ETTh2": 5, "exchange-rate": 5, "ETTm1": 2, "ETTm2": 2, "weather": 2}
"""Test seeds of each data set on a CPU, in the order in which they are best run."""

PUBLISHED: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "ETTh1": {"samformer": (0.381, 0.409, 0.423, 0.427), "tsmixer": (0.398, 0.426, 0.435, 0.498)},
    "ETTh2": {"samformer": (0.295, 0.340, 0.350, 0.391), "tsmixer": (0.308, 0.352, 0.360, 0.409)},
    "ETTm1": {"samformer": (0.329, 0.353, 0.382, 0.429), "tsmixer": (0.336, 0.362, 0.391, 0.450)},
    "ETTm2": {"samformer": (0.181, 0.233, 0.285, 0.375), "tsmixer": (0.211, 0.252, 0.303, 0.390)},
    "exchange-rate": {"samformer": (0.161, 0.246, 0.368, 1.003), "tsmixer": (0.343, 0.342, 0.484, 1.204)},
    "weather": {"samformer": (0.197, 0.235, 0.276, 0.334), "tsmixer": (0.214, 0.231, 0.279, 0.343)},
}
"""Test MSE by horizon, arXiv 2402.10198, table 1."""

RHOS = (0.3, 0.5, 0.7, 1.0)
FACTORS = (3.0, 1.0, 0.3, 0.1)  # of the learning rate


@dataclass(frozen=True)
class Arm:
    """A way to forecast.

    Attributes:
        what: in words.
        model: fields of `ForecastModelConfig`.
        stabilizer: its spec; "{rho}" stands for the radius of SAM.
        first: the name of what is tuned first, "rho", "lr" (a factor), or a field of the model, and its values.
        second: the same of what is tuned next, with two values beside `start`.
        start: what the others are meanwhile.
    """

    what: str
    model: dict[str, Any]
    stabilizer: str = "none"
    first: tuple[str, Sequence[Any]] = ("lr", FACTORS)
    second: tuple[str, Sequence[Any]] = ("weight_decay", (0.01, 0.1))
    start: dict[str, Any] = field(default_factory=dict)


_SAM = {"first": ("rho", RHOS)}  # then weight decay, as with Adam
_TSMIXER = {"kind": "tsmixer", "dim": 64, "depth": 2}

ARMS = {
    "samformer": Arm("SAMformer: channel attention, SAM", {}, "sam:rho={rho}", **_SAM),
    "adam": Arm("the same model with Adam alone (the paper's Transformer)", {}),
    "tsmixer": Arm("TSMixer", _TSMIXER, second=("dropout", (0.3, 0.7)), start={"dropout": 0.1}),
    "tsmixer+sam": Arm("TSMixer with SAM", _TSMIXER, "sam:rho={rho}", **_SAM, start={"dropout": 0.1}),
    "dlinear": Arm("DLinear", {"kind": "dlinear", "revin": False}),
    "itransformer": Arm(
        "iTransformer",
        {"kind": "itransformer", "dim": 128, "depth": 2, "num_heads": 8},
        second=("dropout", (0.3, 0.5)),
        start={"dropout": 0.1},
    ),
}
"""The main table: what is held against SAMformer."""

NEEDED = {
    "sigma": Arm("the same model with sigma-Reparam on its weights", {}, "sigma"),
    "qk-norm": Arm("the same model with QK-norm", {}, "qk-norm"),
    "sam+sigma": Arm("SAM and sigma-Reparam", {}, "sam:rho={rho}+sigma", **_SAM),
    "sam+qk-norm": Arm("SAM and QK-norm", {}, "sam:rho={rho}+qk-norm", **_SAM),
    "frozen": Arm("attention frozen as it is drawn, Adam: a linear model", {"frozen_attention": True}),
}
"""Is SAM needed? These beside "samformer" and "adam"."""

ALL = ARMS | NEEDED
Setting = dict[str, Any]


def first_settings(arm: Arm) -> list[Setting]:
    name, values = arm.first
    return [arm.start | {name: value} for value in values]


def next_settings(arm: Arm, best: Setting) -> list[Setting]:
    name, values = arm.second
    return [best | {name: value} for value in values]


def recipe(data: str, horizon: int, arm: Arm, setting: Setting, seed: int) -> ForecastingRecipe:
    """The published protocol with an arm's model and a setting."""
    known = set(ForecastModelConfig.__dataclass_fields__)
    fields = arm.model | {name: value for name, value in setting.items() if name in known}
    made = published(data, ForecastModelConfig(**{"horizon": horizon, **fields}))
    return replace(
        made,
        stabilizer=arm.stabilizer.format(rho=setting.get("rho")),
        lr=made.lr * setting.get("lr", 1.0),
        weight_decay=setting.get("weight_decay", 0.0),
        keep=1,
        seed=seed,
    )
