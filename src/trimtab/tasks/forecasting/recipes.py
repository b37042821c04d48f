"""Recipes for forecasting: functions that return a typed, frozen config.

The protocol is that of SAMformer (Ilbert, Odonnat et al., arXiv 2402.10198), see docs/forecasting.md: look-back 512,
Adam on batches of 32 windows, a cosine that begins again every 5 epochs, at most 100 epochs, and an end after 5 epochs
in which the validation error did not fall, by which the best weights are kept. `published` makes it for any benchmark,
model and horizon. Sizes of the baselines are our own, and not tuned.
"""

from collections.abc import Callable
from dataclasses import replace

from trimtab.errors import RecipeError
from trimtab.models.forecasting import ForecastModelConfig
from trimtab.tasks.forecasting.forecasting_recipe import ForecastingRecipe
from trimtab.tasks.forecasting.sets import BENCHMARKS
from trimtab.tasks.forecasting.splits import ends_of
from trimtab.tasks.forecasting.toy import SIZES

LOOKBACK, HORIZON = 512, 96
SAM = "sam:rho=0.7"
_SLOW = ("weather", "electricity", "traffic")  # their learning rate is a tenth of that of the others
BATCH, EPOCHS, _PATIENCE, _RESTART = 32, 100, 5, 5


def published(data: str, model: ForecastModelConfig, **changes: object) -> ForecastingRecipe:
    """The published protocol for a benchmark and a model.

    An epoch has as many steps as there are whole batches of training windows.

    Args:
        data: one of `trimtab.tasks.forecasting.sets.BENCHMARKS`.
        model: of which look-back and horizon count here.
        changes: fields of the recipe that shall be others.

    Raises:
        RecipeError: the data are no benchmark, or too few for an epoch of one step.
    """
    if data not in BENCHMARKS:
        raise RecipeError(f"there is no published protocol for {data!r}: expected one of {', '.join(BENCHMARKS)}")
    steps = ends_of(BENCHMARKS[data].rows, BENCHMARKS[data].split)[0]
    windows = steps - model.lookback - model.horizon + 1
    if windows < BATCH:
        raise RecipeError(
            f"{data} has {steps} training steps, too few for {BATCH} windows of look-back {model.lookback} + horizon "
            f"{model.horizon}"
        )
    lr = 1e-4 if data in _SLOW else 1e-3
    return replace(protocol(data, model, windows), **{"lr": lr, **changes})  # type: ignore[arg-type]  # fields are checked there


def protocol(
    data: str, model: ForecastModelConfig, windows: int, *, batch_size: int = BATCH, epochs: int = EPOCHS
) -> ForecastingRecipe:
    """The published protocol for any series: steps, restarts and evaluations by its epochs.

    Args:
        data: as `ForecastingRecipe` takes it.
        model: the model.
        windows: for training; at least `batch_size`.
        batch_size: windows in a step.
        epochs: at most so many.
    """
    epoch = windows // batch_size
    return ForecastingRecipe(
        data=data,
        model=model,
        optimizer="adam",
        lr=1e-3,
        schedule="cosine_restarts",
        restart_every=_RESTART * epoch,
        min_lr=1e-6,
        batch_size=batch_size,
        steps=epochs * epoch,
        patience=_PATIENCE,
        watch_every=epoch,
        eval_every=epoch,
        checkpoint_every=_RESTART * epoch,
    )


def samformer_etth1() -> ForecastingRecipe:
    """SAMformer on ETTh1, hourly load and oil of a transformer, in minutes: Adam with SAM."""
    return _samformer("ETTh1")


def samformer_etth2() -> ForecastingRecipe:
    """SAMformer on ETTh2, load and oil of another transformer, in minutes: Adam with SAM."""
    return _samformer("ETTh2")


def samformer_ettm1() -> ForecastingRecipe:
    """SAMformer on ETTm1, the first transformer by quarters of an hour: Adam with SAM."""
    return _samformer("ETTm1")


def samformer_ettm2() -> ForecastingRecipe:
    """SAMformer on ETTm2, the other transformer by quarters of an hour: Adam with SAM."""
    return _samformer("ETTm2")


def samformer_exchange() -> ForecastingRecipe:
    """SAMformer on eight daily exchange rates: Adam with SAM."""
    return _samformer("exchange-rate")


def samformer_weather() -> ForecastingRecipe:
    """SAMformer on 21 values of the weather in Jena every 10 minutes: Adam with SAM."""
    return _samformer("weather")


def samformer_illness() -> ForecastingRecipe:
    """SAMformer on weekly counts of influenza, look-back 104, horizon 24: Adam with SAM."""
    return _samformer("national-illness", lookback=104, horizon=24)


def samformer_illness_36() -> ForecastingRecipe:
    """SAMformer on weekly counts of influenza, look-back 36, horizon 24: Adam with SAM."""
    return _samformer("national-illness", lookback=36, horizon=24)


def samformer_electricity() -> ForecastingRecipe:
    """SAMformer on hourly electricity of 321 customers, your own copy: Adam with SAM."""
    return _samformer("electricity")


def samformer_traffic() -> ForecastingRecipe:
    """SAMformer on hourly traffic of 862 lanes, your own copy: Adam with SAM."""
    return _samformer("traffic")


def transformer_etth1() -> ForecastingRecipe:
    """A Transformer over time steps on ETTh1, to compare SAMformer with: Adam."""
    return _baseline(ForecastModelConfig("transformer", dropout=0.1))


def tsmixer_etth1() -> ForecastingRecipe:
    """TSMixer on ETTh1, to compare SAMformer with: Adam."""
    return _baseline(ForecastModelConfig("tsmixer", dim=64, dropout=0.1))


def dlinear_etth1() -> ForecastingRecipe:
    """DLinear on ETTh1, two linear maps without RevIN, to compare SAMformer with: Adam."""
    return _baseline(ForecastModelConfig("dlinear", revin=False))


def itransformer_etth1() -> ForecastingRecipe:
    """The iTransformer on ETTh1, to compare SAMformer with: Adam."""
    return _baseline(ForecastModelConfig("itransformer", dim=128, num_heads=8, dropout=0.1))


def forecast_toy() -> ForecastingRecipe:
    """SAMformer's toy problem, a linear map and noise, for its Transformer: Adam without SAM.

    No RevIN. Settings of training are our own, and not tuned. What is best has a mean squared error of 1.
    """
    epoch = SIZES[0] // 100
    return ForecastingRecipe(
        data="toy",
        model=ForecastModelConfig("samformer", LOOKBACK, HORIZON, revin=False),
        optimizer="adam",
        lr=1e-2,
        schedule="cosine",
        batch_size=100,
        steps=30 * epoch,
        watch_every=epoch,
        eval_every=epoch,
    )


def _samformer(data: str, lookback: int = LOOKBACK, horizon: int = HORIZON) -> ForecastingRecipe:
    return published(data, ForecastModelConfig("samformer", lookback, horizon), stabilizer=SAM)


def _baseline(model: ForecastModelConfig) -> ForecastingRecipe:
    return published("ETTh1", replace(model, lookback=LOOKBACK, horizon=HORIZON))


FORECASTING_RECIPES: dict[str, Callable[[], ForecastingRecipe]] = {
    "samformer-etth1": samformer_etth1,
    "samformer-etth2": samformer_etth2,
    "samformer-ettm1": samformer_ettm1,
    "samformer-ettm2": samformer_ettm2,
    "samformer-exchange": samformer_exchange,
    "samformer-weather": samformer_weather,
    "samformer-illness": samformer_illness,
    "samformer-illness-36": samformer_illness_36,
    "samformer-electricity": samformer_electricity,
    "samformer-traffic": samformer_traffic,
    "transformer-etth1": transformer_etth1,
    "tsmixer-etth1": tsmixer_etth1,
    "dlinear-etth1": dlinear_etth1,
    "itransformer-etth1": itransformer_etth1,
    "forecast-toy": forecast_toy,
}
"""Name to the function that returns the recipe."""
