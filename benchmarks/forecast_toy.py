"""SAMformer's toy problem: a linear map and noise, which a Transformer does not find and SAM does. Why?

    python benchmarks/forecast_toy.py              # about half an hour on 2 cores; killed, it goes on where it was
    python benchmarks/forecast_toy.py --seeds 1    # the smallest useful table
    python benchmarks/forecast_toy.py --quick      # every arm, one setting, 20 steps: does it run?

Ilbert, Odonnat et al. (arXiv 2402.10198), section 3: Y = X W + e, 10,000 examples of 7 channels, look-back 512, horizon
96, all of N(0, 1), so that the best mean squared error is 1. The model is one channel attention with its residual and
a linear head, without RevIN, in which the solution lies: attention that gives nothing. Arms:

  transformer    trained by Adam
  frozen         its attention stays as it is drawn, Adam
  sigma          sigma-Reparam on the weights, Adam (the released study normalises the inputs instead)
  sam            Adam with SAM
  sam, sigma     both

Each arm is tuned over four settings, the learning rate, or with SAM two of it and two radii, and on where the best
stands at an edge of them (forecasting_arms.py), with seed 0 by the validation error, in runs that have no test part;
the best runs with new seeds. 30 epochs of batches of 100, cosine.

Draws four pictures into results/forecast_toy.png: training and validation error over time, with the best possible;
the entropy of the attention over its maximum; the sharpness, the largest eigenvalue of the Hessian of the mean loss on
1,000 fixed training examples of the 10,000 (fewer would be sharper than all); and the attention between the channels at
the end, mean over test examples. Writes
results/forecast_toy.json.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import forecast_toy_pictures
import grids
import measure
import torch
import tuning
from forecasting_arms import Tuning
from hessian_metrics import RAW, remembered, with_eigenvalues
from torch import Tensor, nn
from torch.optim import Optimizer
from tuning import Setting, best

from trimtab.report.runlog import number, read_run
from trimtab.tasks.forecasting import ForecastingRecipe
from trimtab.tasks.forecasting.recipes import forecast_toy
from trimtab.tasks.forecasting.toy import BAYES_MSE
from trimtab.tasks.task import Task
from trimtab.train.checkpoints import newest_checkpoint
from trimtab.train.compare.grid import RunPlace
from trimtab.train.compare.running import finished, run_places
from trimtab.train.hardware import Hardware
from trimtab.train.trained import Trained, load_trained

EXAMPLES = 1000  # of which the sharpness is
OUTWARDS = 4  # strokes on from an edge
LRS = [{"lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)]
HIGHER = [{"lr": lr} for lr in (1e-2, 3e-2, 1e-1, 3e-1)]  # gammas are all that moves the norm of a weight
RADII = [{"lr": lr, "rho": rho} for lr in (3e-3, 1e-2) for rho in (0.3, 0.7)]
HIGHER_RADII = [{"lr": lr, "rho": rho} for lr in (3e-2, 1e-1) for rho in (0.3, 0.7)]
ARMS: dict[str, tuple[str, bool, list[Setting]]] = {
    "transformer": ("none", False, LRS),
    "frozen": ("none", True, LRS),
    "sigma": ("sigma", False, HIGHER),
    "sam": ("sam:rho={rho}", False, RADII),
    "sam, sigma": ("sam:rho={rho}+sigma", False, HIGHER_RADII),
}
"""Name: the stabilizer, whether the attention is frozen, and the settings to be tuned over."""


@dataclass(frozen=True, kw_only=True)
class Sharp(ForecastingRecipe):
    """The forecasting task with the largest eigenvalue of the Hessian as a metric."""

    def task(self) -> Task:
        return with_eigenvalues(super().task(), EXAMPLES)

    def optimizers(self, model: nn.Module) -> list[Optimizer]:
        return remembered(model, super().optimizers(model))


def recipe(name: str, setting: Setting, seed: int, quick: bool) -> ForecastingRecipe:
    """The toy recipe with an arm's setting: for tuning without the test part, else with the sharpness."""
    stabilizer, frozen, _ = ARMS[name]
    toy = forecast_toy()
    fields = {field: getattr(toy, field) for field in toy.__dataclass_fields__}
    made = replace(
        (Tuning if seed == tuning.SEED else Sharp)(**fields),
        model=replace(toy.model, frozen_attention=frozen),
        stabilizer=stabilizer.format(rho=setting.get("rho")),
        lr=setting["lr"],
        seed=seed,
        keep=1,
    )
    return replace(made, steps=20, watch_every=10, eval_every=20) if quick else made


def planned(folder: Path, name: str, setting: Setting, seed: int, quick: bool) -> RunPlace:
    words = "_".join(f"{key}={value}" for key, value in setting.items())
    return RunPlace(
        f"{name} {words} seed{seed}",
        name,
        recipe(name, setting, seed, quick),
        folder / name.replace(", ", "+") / words / f"seed{seed}",
    )


def run(places: Sequence[RunPlace], jobs: int | None) -> None:
    run_places(places, jobs=jobs, on_news=grids.teller(len(places)), hardware=Hardware(accelerator="cpu"))


def row(place: RunPlace) -> dict[str, Any]:
    """How a run ended, and its curves: at each epoch."""
    result = finished(place)
    if result is None:
        return {"arm": place.arm, "seed": place.recipe.seed, "status": "failed"}
    log = read_run(place.folder)
    names = ("step", "loss", "mse", "entropy_min", RAW)
    return {
        "arm": place.arm,
        "seed": place.recipe.seed,
        "status": result.status,
        "test_mse": result.test.get("mse"),
        "validation_mse": result.metrics.get("mse"),
        "seconds": result.seconds,
        "curves": {name: [number(line.get(name)) for line in log.lines] for name in names},
    }


@torch.no_grad()
def attention_map(place: RunPlace) -> list[list[float]]:
    """The attention between channels at the end, (C, C), mean over 200 test examples."""
    checkpoint = newest_checkpoint(place.folder)
    assert checkpoint is not None
    assert isinstance(place.recipe, ForecastingRecipe)
    recipe, parts = place.recipe, place.recipe.parts()
    model = load_trained(Trained(recipe, {}, checkpoint), lambda: recipe.make_model(parts.channels))
    assert parts.test is not None
    x, _ = parts.test.batch(torch.arange(200), torch.Generator())
    query, key = model.attention.query(x), model.attention.key(x)  # (B, C, D)
    weights: Tensor = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
    found: list[list[float]] = weights.mean(0).tolist()
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one arm's runs: medians with smallest and largest."""
    ended = [each for each in rows if each.get("test_mse") is not None]

    def last(name: str) -> list[float]:
        return [each["curves"][name][-1] for each in ended]

    return {
        "test_mse": [each["test_mse"] for each in ended],
        "train_loss": last("loss"),
        "entropy_end": last("entropy_min"),
        "sharpness_end": last(RAW),
        "failed": len(rows) - len(ended),
    }


def show(table: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\nbest possible: {BAYES_MSE}; median (smallest-largest) of the seeds")
    print(f"{'':13}{'test MSE':>24}{'training loss':>24}{'entropy (0-1)':>24}{'sharpness':>30}")
    for name, found in table.items():
        keys = ("test_mse", "train_loss", "entropy_end", "sharpness_end")
        cells = [measure.spread(found[key]) if found[key] else "failed" for key in keys]
        print(f"{name:13}{cells[0]:>24}{cells[1]:>24}{cells[2]:>24}{cells[3]:>30}  {found['setting']}")


def entropy_end(place: RunPlace) -> float | None:
    """Of the attention over its maximum, when a run ended; None if it did not."""
    return number(read_run(place.folder).column("entropy_min")[-1]) if finished(place) else None


def show_tuning(tried: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    print("\nwhile tuning, seed 0: validation MSE, and entropy at the end")
    for arm, each in tried.items():
        for found in each:
            entropy = found["entropy_end"]
            told = "failed" if entropy is None else f"{entropy:.3f}"
            print(f"{arm:13}{found['validation_mse']:>10.3f}{told:>8}  {found['setting']}")


def main() -> None:
    arguments = grids.options(__doc__, seeds=3).parse_args()
    name, folder = grids.place("forecast_toy", arguments)
    quick = arguments.quick
    tried = tuning.tune(
        list(ARMS),
        [lambda arm, _: ARMS[arm][2][: 1 if quick else None]],
        lambda arm, setting: planned(folder, arm, setting, tuning.SEED, quick),
        lambda places: run(places, arguments.jobs),
        0 if quick else OUTWARDS,
    )
    chosen = {arm: best(each) for arm, each in tried.items()}
    seeds = range(1, 2 if quick else arguments.seeds + 1)
    places = [planned(folder, arm, chosen[arm], seed, quick) for seed in seeds for arm in ARMS]
    run(places, arguments.jobs)

    rows = [row(place) for place in places]
    table = {arm: summary([each for each in rows if each["arm"] == arm]) | {"setting": chosen[arm]} for arm in ARMS}
    show(table)
    while_tuning = {
        arm: [
            each | {"entropy_end": entropy_end(planned(folder, arm, each["setting"], tuning.SEED, quick))}
            for each in tuning.told(found)
        ]
        for arm, found in tried.items()
    }
    show_tuning(while_tuning)
    results = {"tried": while_tuning, "table": table, "runs": rows}
    measure.write(name, results)
    maps = {place.arm: attention_map(place) for place in places if place.recipe.seed == 1 and ended(place)}
    path = measure.write(name, results | {"attention_maps": maps})
    print("written to", path, forecast_toy_pictures.draw(name, rows, maps, BAYES_MSE))
    if seconds := [each["seconds"] for each in rows if "seconds" in each]:
        print(f"a run took {statistics.median(seconds):.0f} s by the median")


def ended(place: RunPlace) -> bool:
    result = finished(place)
    return result is not None and result.status == "finished"


if __name__ == "__main__":
    main()
