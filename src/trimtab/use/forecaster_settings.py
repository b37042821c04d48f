"""How a `Forecaster` is trained, and the recipe that this makes for a series."""

from dataclasses import asdict, dataclass, replace
from typing import Literal, get_type_hints

from trimtab.errors import DataError, RecipeError
from trimtab.models.forecasting import ForecastModelConfig
from trimtab.stabilizers import with_changes
from trimtab.tasks.forecasting.forecasting_recipe import ForecastingRecipe
from trimtab.tasks.forecasting.recipes import BATCH, EPOCHS, FORECASTING_RECIPES, protocol
from trimtab.tasks.forecasting.series import Missing
from trimtab.tasks.forecasting.splits import Split
from trimtab.tasks.typed import typed
from trimtab.words import nearest

_STEPS = 16  # of an epoch of a short series
_WITH_ATTENTION = ("samformer", "transformer", "itransformer")


@dataclass(frozen=True, kw_only=True)
class ForecasterSettings:
    """What decides the numbers of a forecaster, beside its data; see `trimtab.use.Forecaster`.

    Attributes:
        model: with look-back and horizon, and no channels.
        stabilizer: as recipes have it.
        lr: peak learning rate.
        epochs: at most so many.
        batch_size: windows in a step; None for 32, or fewer of a short series, so that an epoch has 16 steps.
        missing: what becomes of missing values.
        seed: of the weights and the order of windows.
        accelerator: where to train.

    Raises:
        RecipeError: a field is out of range, or has the wrong type.
    """

    model: ForecastModelConfig
    stabilizer: str
    lr: float = 1e-3
    epochs: int = EPOCHS
    batch_size: int | None = None
    missing: Missing = "refuse"
    seed: int = 0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            typed(kind, asdict(self.model) if name == "model" else getattr(self, name), name)
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} must be at least 1, got {value}")
        any_size = self.batch_size or BATCH
        with_changes(self._recipe("", any_size, any_size, None), self.stabilizer)

    def recipe(self, data: str, train: int, split: Split | None, *, watch: bool = True) -> ForecastingRecipe:
        """The recipe for a series.

        Args:
            data: as `ForecastingRecipe` takes it.
            train: steps for training.
            split: of all steps.
            watch: whether Watch looks on, if the model has attention.

        Raises:
            DataError: there are fewer windows for training than a step has.
        """
        windows = train - self.model.lookback - self.model.horizon + 1
        batch_size = self.batch_size or max(self.model.least_batch, min(BATCH, windows // _STEPS))
        if windows < batch_size:
            raise DataError(
                f"{train:,} training steps make {max(0, windows):,} windows of look-back {self.model.lookback} + "
                f"horizon {self.model.horizon}; expected {batch_size:,} or more: take a longer series, or a smaller "
                "look-back or horizon"
            )
        made = self._recipe(data, windows, batch_size, split)
        return replace(made, watch=watch and self.model.kind in _WITH_ATTENTION)

    def _recipe(self, data: str, windows: int, batch_size: int, split: Split | None) -> ForecastingRecipe:
        made = protocol(data, self.model, windows, batch_size=batch_size, epochs=self.epochs)
        return replace(
            made, stabilizer=self.stabilizer, lr=self.lr, seed=self.seed, keep=1, split=split, missing=self.missing
        )


def usual(kind: str) -> tuple[ForecastModelConfig, str]:
    """The model of a kind, and its stabilizer, as the recipe of that name for ETTh1 has them.

    Raises:
        RecipeError: there is no such kind.
    """
    kinds = [name.removesuffix("-etth1") for name in FORECASTING_RECIPES if name.endswith("-etth1")]
    if kind not in kinds:
        raise RecipeError(f"model must be one of {', '.join(kinds)}; got {kind!r}.{nearest(str(kind), kinds)}")
    recipe = FORECASTING_RECIPES[f"{kind}-etth1"]()
    return recipe.model, recipe.stabilizer
