"""The arms of forecasting.py: models, stabilizers, the settings that each is tuned over, and what has been published.

Every arm has nine settings, found in four strokes: four values of what matters most to it, then twice two more of
what is next, at the best so far. With SAM these are its radius, the learning rate and weight decay; without it the
learning rate, weight decay or dropout, and finer learning rates. They are multiples of the published one, 1e-3, and
1e-4 for the weather. Last, RevIN with learned gains, which both released forms of SAMformer have; for DLinear, which
has none, RevIN itself. Where the best has the largest or smallest radius or learning rate of all that were tried,
twice or half of it is tried as well, until it has not (tuning.py).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tuning import Setting

from trimtab.models.forecasting import ForecastModelConfig
from trimtab.tasks.forecasting import ForecastingRecipe
from trimtab.tasks.forecasting.recipes import published
from trimtab.tasks.task import Task

HORIZONS = (96, 192, 336, 720)
SEEDS = {"ETTh1": 5, "ETTh2": 5, "exchange-rate": 5, "ETTm1": 2, "ETTm2": 2, "weather": 2}
"""Test seeds of each data set on a CPU, in the order in which they are best run."""

PUBLISHED: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "ETTh1": {
        "samformer": (0.381, 0.409, 0.423, 0.427),
        "adam": (0.509, 0.535, 0.570, 0.601),
        "tsmixer": (0.398, 0.426, 0.435, 0.498),
        "tsmixer+sam": (0.388, 0.421, 0.430, 0.440),
    },
    "ETTh2": {
        "samformer": (0.295, 0.340, 0.350, 0.391),
        "adam": (0.396, 0.413, 0.414, 0.424),
        "tsmixer": (0.308, 0.352, 0.360, 0.409),
        "tsmixer+sam": (0.305, 0.350, 0.360, 0.402),
    },
    "ETTm1": {
        "samformer": (0.329, 0.353, 0.382, 0.429),
        "adam": (0.384, 0.400, 0.461, 0.463),
        "tsmixer": (0.336, 0.362, 0.391, 0.450),
        "tsmixer+sam": (0.327, 0.356, 0.387, 0.441),
    },
    "ETTm2": {
        "samformer": (0.181, 0.233, 0.285, 0.375),
        "adam": (0.200, 0.273, 0.310, 0.426),
        "tsmixer": (0.211, 0.252, 0.303, 0.390),
        "tsmixer+sam": (0.190, 0.250, 0.301, 0.389),
    },
    "exchange-rate": {
        "samformer": (0.161, 0.246, 0.368, 1.003),
        "adam": (0.292, 0.372, 0.494, 1.323),
        "tsmixer": (0.343, 0.342, 0.484, 1.204),
        "tsmixer+sam": (0.233, 0.342, 0.474, 1.078),
    },
    "weather": {
        "samformer": (0.197, 0.235, 0.276, 0.334),
        "adam": (0.227, 0.256, 0.278, 0.353),
        "tsmixer": (0.214, 0.231, 0.279, 0.343),
        "tsmixer+sam": (0.189, 0.228, 0.271, 0.331),
    },
}
"""Test MSE by horizon, arXiv 2402.10198, table 1; "adam" is its Transformer."""

Stroke = tuple[str, Sequence[Any]]
LR: Stroke = ("lr", (3.0, 1.0, 0.3, 0.1))
FINER: Stroke = ("lr", (2.0, 0.5))
DECAY: Stroke = ("weight_decay", (0.01, 0.1))
GAINS: Stroke = ("affine", (True,))
RHO: Stroke = ("rho", (0.3, 0.5, 0.7, 1.0))
COARSE: Stroke = ("lr", (3.0, 0.3))
SAM = (RHO, COARSE, DECAY, GAINS)


@dataclass(frozen=True)
class Arm:
    """A way to forecast.

    Attributes:
        what: in words.
        model: fields of `ForecastModelConfig`.
        stabilizer: its spec; "{rho}" stands for the radius of SAM.
        strokes: what is tuned, one after the other: "rho", "lr" (each value times the best so far), "weight_decay", or
            a field of the model, and its values.
        start: what the others are meanwhile.
    """

    what: str
    model: dict[str, Any]
    stabilizer: str = "none"
    strokes: tuple[Stroke, ...] = (LR, DECAY, FINER, GAINS)
    start: dict[str, Any] = field(default_factory=dict)


_TSMIXER = {"kind": "tsmixer", "dim": 64, "depth": 2}
_DROPOUT: Stroke = ("dropout", (0.7, 0.9))

ARMS = {
    "samformer": Arm("SAMformer: channel attention, SAM", {}, "sam:rho={rho}", SAM),
    "adam": Arm("the same model with Adam alone (the paper's Transformer)", {}),
    "tsmixer": Arm("TSMixer", _TSMIXER, "none", (LR, _DROPOUT, FINER, GAINS), {"dropout": 0.3}),
    "tsmixer+sam": Arm("TSMixer with SAM", _TSMIXER, "sam:rho={rho}", (RHO, COARSE, _DROPOUT, GAINS), {"dropout": 0.3}),
    "dlinear": Arm("DLinear", {"kind": "dlinear"}, "none", (LR, DECAY, FINER, ("revin", (True,))), {"revin": False}),
    "itransformer": Arm(
        "iTransformer",
        {"kind": "itransformer", "dim": 128, "depth": 2, "num_heads": 8},
        "none",
        (LR, ("dropout", (0.3, 0.5)), FINER, GAINS),
        {"dropout": 0.1},
    ),
}
"""The main table: what is held against SAMformer."""

NEEDED = {
    "sigma": Arm("the same model with sigma-Reparam on its weights", {}, "sigma"),
    "qk-norm": Arm("the same model with QK-norm", {}, "qk-norm"),
    "sam+sigma": Arm("SAM and sigma-Reparam", {}, "sam:rho={rho}+sigma", SAM),
    "sam+qk-norm": Arm("SAM and QK-norm", {}, "sam:rho={rho}+qk-norm", SAM),
    "frozen": Arm("attention frozen as it is drawn, Adam", {"frozen_attention": True}),
    "sam+frozen": Arm("the same with SAM", {"frozen_attention": True}, "sam:rho={rho}", SAM),
}
"""Is SAM needed? These beside "samformer" and "adam"."""

ALL = ARMS | NEEDED


def settings(arm: Arm, stroke: int, best: Setting | None) -> list[Setting]:
    """What is tried in a stroke, at the best setting of those before."""
    name, values = arm.strokes[stroke]
    base = arm.start if best is None else best
    return [base | {name: base.get(name, 1.0) * value if name == "lr" else value} for value in values]


@dataclass(frozen=True, kw_only=True)
class Tuning(ForecastingRecipe):
    """The same without a test part: what chooses cannot see it."""

    def task(self) -> Task:
        return replace(super().task(), test=None)


def recipe(
    data: str, horizon: int, arm: Arm, setting: Setting, seed: int, *, tuning: bool = False
) -> ForecastingRecipe:
    """The published protocol with an arm's model and a setting; without the test part, for tuning."""
    known = set(ForecastModelConfig.__dataclass_fields__)
    fields = arm.model | {name: value for name, value in setting.items() if name in known}
    made = published(data, ForecastModelConfig(**{"horizon": horizon, **fields}))
    kind = Tuning if tuning else ForecastingRecipe
    return replace(
        kind(**{each.name: getattr(made, each.name) for each in dataclasses.fields(made)}),
        stabilizer=arm.stabilizer.format(rho=setting.get("rho")),
        lr=made.lr * setting.get("lr", 1.0),
        weight_decay=setting.get("weight_decay", 0.0),
        keep=1,
        seed=seed,
    )
