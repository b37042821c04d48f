"""Long-horizon forecasting: SAMformer, what it is made of, and its strongest rivals, each tuned with the same effort.

    python benchmarks/forecasting.py ETTh1                      # a data set; hours on 2 cores; killed, it goes on
    python benchmarks/forecasting.py ETTh1 --horizons 96        # the smallest useful table
    python benchmarks/forecasting.py ETTh1 --needed             # is SAM needed? Adam, SAM, sigma-Reparam, QK-norm, both
    python benchmarks/forecasting.py ETTh1 --strokes 3          # tuned over the first strokes alone; results of its own
    python benchmarks/forecasting.py table                      # nothing is trained: all results so far, in one table
    python benchmarks/forecasting.py ETTh1 --quick              # two arms, one setting, one epoch: does it run?

Data sets: ETTh1, ETTh2, exchange-rate, ETTm1, ETTm2, weather, in the order of their cost.

The protocol is the published one (Ilbert, Odonnat et al., arXiv 2402.10198; see `trimtab.tasks.forecasting.recipes`):
look-back 512, batches of 32, Adam, a cosine that begins again every 5 epochs, at most 100 epochs, the best weights by
validation kept after 5 epochs without better. Every arm is tuned over nine settings (forecasting_arms.py), and on
where the best stands at an edge of them, with seed 0, by the validation MSE alone, in runs that have no test part; the
best then runs with new seeds, five (two on ETTm1, ETTm2 and weather, all five where a GPU is there), each tested once,
at its end. MSE and MAE on scaled data.

Prints for each horizon the published test MSE, ours as mean ± standard deviation over seeds, MAE, the validation MSE,
the lowest entropy of a head at the end of each run, parameters (those of attention included) and seconds of a run;
SAMformer less each other arm, paired by seed, with the 95 % interval of Student's t; and what the last value and the
last season have. Writes results/forecasting_<data>.json, in which horizons and arms of earlier calls stay; `table`
reads them all, prints the whole table with the improvement over TSMixer and the ratio of parameters, and draws
results/forecasting.png.
"""

import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import forecasting_table
import grids
import measure
import torch
import tuning
from forecasting_arms import ALL, ARMS, HORIZONS, NEEDED, SEEDS, recipe, settings
from tuning import Setting, Tried, best, told

from trimtab.models.forecasting import ForecastModelConfig
from trimtab.report.runlog import read_run
from trimtab.tasks.forecasting import naive, published
from trimtab.train.compare.grid import RunPlace
from trimtab.train.compare.running import finished, run_places
from trimtab.train.hardware import Hardware

OUTWARDS = 6  # strokes on from an edge


def words(setting: Setting) -> str:
    return " ".join(f"{name}={value}" for name, value in setting.items())


def planned(options: Namespace, folder: Path, horizon: int, name: str, setting: Setting, seed: int) -> RunPlace:
    made = recipe(options.data, horizon, ALL[name], setting, seed, tuning=seed == tuning.SEED)
    if options.quick:
        made = replace(made, steps=10, watch_every=5, eval_every=10, checkpoint_every=10)
    place = folder / str(horizon) / name / words(setting).replace(" ", "_") / f"seed{seed}"
    return RunPlace(f"{options.data} {horizon} {name} {words(setting)} seed{seed}", name, made, place)


def run(places: Sequence[RunPlace], jobs: int | None) -> None:
    run_places(places, jobs=jobs, on_news=grids.teller(len(places)), hardware=Hardware())


def tuned(options: Namespace, folder: Path, horizon: int, names: Sequence[str]) -> dict[str, list[Tried]]:
    """The settings of each arm and their validation errors."""

    def stroke(number: int, name: str, best_so_far: Setting | None) -> list[Setting]:
        return settings(ALL[name], number, best_so_far)[: 1 if options.quick else None]

    def plan(name: str, setting: Setting) -> RunPlace:
        return planned(options, folder, horizon, name, setting, tuning.SEED)

    numbers = range(1 if options.quick else options.strokes or max(len(ALL[name].strokes) for name in names))
    strokes = [partial(stroke, number) for number in numbers]
    return tuning.tune(names, strokes, plan, lambda places: run(places, options.jobs), 0 if options.quick else OUTWARDS)


def cell(options: Namespace, folder: Path, horizon: int, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """One horizon: tuned, then run with the seeds. By arm what was tried, what was chosen, and every run."""
    tried = tuned(options, folder, horizon, names)
    # seed by seed, so that a part of them is a fair table too
    places = [planned(options, folder, horizon, name, best(tried[name]), seed) for seed in seeds for name in names]
    run(places, options.jobs)
    return {
        name: {
            "setting": best(tried[name]),
            "tried": told(tried[name]),
            "runs": [row(place) for place in places if place.arm == name],
            "machine": measure.machine(),
        }
        for name in names
    }


def row(place: RunPlace) -> dict[str, Any]:
    result = finished(place)
    facts: dict[str, Any] = {"seed": place.recipe.seed}
    if result is None:
        return facts | {"status": "failed"}
    log = read_run(place.folder)
    entropies = [value for value in log.column("entropy_min") if value == value]
    return facts | {
        "status": result.status,
        "test_mse": result.test.get("mse"),
        "test_mae": result.test.get("mae"),
        "validation_mse": result.metrics.get("mse"),
        "epochs": result.steps / place.recipe.eval_every,
        "best_epoch": result.best_step / place.recipe.eval_every,
        "seconds": result.seconds,
        "parameters": log.info["parameters"],
        "entropy_min_end": entropies[-1] if entropies else None,
    }


def naive_errors(data: str, horizon: int) -> dict[str, dict[str, float]]:
    """What nothing learned has on the test part: the last value, and the last season, again and again."""
    parts = published(data, ForecastModelConfig(horizon=horizon)).parts()
    assert parts.test is not None
    found = {"last value": naive.measure(lambda x: naive.last_value(x, horizon), parts.test)}
    if season := parts.season:
        found["last season"] = naive.measure(lambda x: naive.last_season(x, horizon, season), parts.test)
    return found


def write(name: str, data: str, horizon: int, found: Mapping[str, Any]) -> Path:
    """Add a horizon's arms to what earlier calls have left."""
    before = measure.read(name)
    arms = before.get("cells", {}).get(str(horizon), {}) | dict(found)
    ordered = {arm: arms[arm] for arm in ALL if arm in arms}
    cells = before.get("cells", {}) | {str(horizon): ordered}
    nothing = before.get("naive", {}) | {str(horizon): naive_errors(data, horizon)}
    results = {"cells": cells, "naive": nothing}
    return measure.write(name, {what: dict(sorted(each.items(), key=_horizon)) for what, each in results.items()})


def _horizon(item: tuple[str, Any]) -> int:
    return int(item[0])


def options() -> Namespace:
    parser = grids.options(__doc__, seeds=None)
    parser.add_argument("data", choices=[*SEEDS, "table"])
    parser.add_argument("--horizons", default=",".join(map(str, HORIZONS)))
    parser.add_argument("--arms", help="names joined by commas; those of the main table by default")
    parser.add_argument("--strokes", type=int, choices=(1, 2, 3), help="tune over so many strokes alone")
    parser.add_argument("--needed", action="store_true", help="the arms that answer whether SAM is needed")
    found = parser.parse_args()
    names = found.arms.split(",") if found.arms else ["samformer", "adam", *NEEDED] if found.needed else list(ARMS)
    if unknown := sorted(set(names) - set(ALL)):
        parser.error(f"unknown arm {unknown[0]}; there are: {', '.join(ALL)}")
    found.names = names[:2] if found.quick else names
    found.all_horizons = [int(word) for word in found.horizons.split(",")]
    if wrong := sorted(set(found.all_horizons) - set(HORIZONS)):
        parser.error(f"no horizon {wrong[0]}; there are: {', '.join(map(str, HORIZONS))}")
    return found


def main() -> None:
    chosen = options()
    if chosen.data == "table":
        forecasting_table.write_table()
        return
    name, folder = grids.place(f"forecasting_{chosen.data}", chosen)
    name += f"_{chosen.strokes}_strokes" if chosen.strokes else ""
    count = chosen.seeds or (5 if torch.cuda.is_available() else SEEDS[chosen.data])
    seeds = [1] if chosen.quick else list(range(1, count + 1))
    for horizon in chosen.all_horizons[: 1 if chosen.quick else None]:
        found = cell(chosen, folder, horizon, chosen.names, seeds)
        path = write(name, chosen.data, horizon, found)
        print("\n".join(forecasting_table.cell(chosen.data, horizon, measure.read(name))))
        seconds = [each["seconds"] for arm in found.values() for each in arm["runs"] if "seconds" in each]
        if seconds:
            print(f"written to {path}; a run took {statistics.median(seconds):.0f} s by the median")


if __name__ == "__main__":
    main()
