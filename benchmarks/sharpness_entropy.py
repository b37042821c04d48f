"""Does attention entropy stand in for sharpness? The two beside each other, over runs, learning rates and time.

    python benchmarks/sharpness_entropy.py             # about 25 minutes on 2 cores; killed, it goes on where it was
    python benchmarks/sharpness_entropy.py --seeds 1   # the smallest useful table
    python benchmarks/sharpness_entropy.py --quick     # digits, two learning rates, 20 steps: does it run?

The claim of Zhai et al. (arXiv 2303.06296) is that low attention entropy goes with high sharpness. Here the small ViTs
of entropy_collapse.py (AdamW, constant learning rate, no warmup) train on digits (200 steps) and Fashion-MNIST (500) at
learning rates from harmless to hopeless. Every 40 (100) steps the largest eigenvalue of the Hessian is measured, raw
and preconditioned by Adam, on one fixed batch of 128 training images, the same in all runs.

Spearman's rank correlations, with 95 % intervals over runs:
  at the end     the last measurement of every run; NaN numbers of diverged runs are left out
  at its worst   lowest entropy against highest eigenvalue of the run
  within a run   over its measurements, median of the runs
and, since the learning rate moves everything, the first two also given the learning rate. The largest logit, which
costs nothing, is held against both beside it.

Writes results/sharpness_entropy.json and .png.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grids
import measure
import numpy as np
import sharpness_pictures
from hessian_metrics import PRECONDITIONED, RAW, remembered, with_eigenvalues
from rank_correlation import rank_correlation, with_interval, within
from torch import nn
from torch.optim import Optimizer

from trimtab.report.runlog import Floats, number, read_run
from trimtab.tasks.images import ImagesRecipe, vit_digits, vit_fashion
from trimtab.tasks.task import Task
from trimtab.train.compare import compare
from trimtab.train.hardware import Hardware

ARMS = {
    "pre-LN": "none",
    "qk-norm": "qk-norm",
    "sigma-Reparam": "sigma:gamma_init=one:init_std=0.4:remove_norms=true",
}
LRS = {"digits": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "fashion-mnist": (1e-3, 4e-3, 1.6e-2, 6.4e-2)}
SEEDS = {"digits": 5, "fashion-mnist": 2}
PAIRS = (("entropy_min", RAW), ("entropy_min", PRECONDITIONED), ("max_logit", RAW), ("max_logit", PRECONDITIONED))
WITH_LR = ("entropy_min", "max_logit", RAW, PRECONDITIONED)


@dataclass(frozen=True, kw_only=True)
class Sharp(ImagesRecipe):
    """The images task with two more metrics: the largest eigenvalues of the Hessian, raw and preconditioned."""

    sharpness_batch: int = 128

    def task(self) -> Task:
        return with_eigenvalues(super().task(), self.sharpness_batch)

    def optimizers(self, model: nn.Module) -> list[Optimizer]:
        return remembered(model, super().optimizers(model))


def recipes(quick: bool) -> dict[str, Sharp]:
    """The data sets and their recipes, but for stabilizer and learning rate."""
    digits = Sharp(data="digits", model=vit_digits().model, steps=200, watch_every=20, eval_every=40)
    if quick:
        return {"digits": replace(digits, steps=20, watch_every=5, eval_every=5, sharpness_batch=32)}
    model = replace(vit_fashion().model, patch_size=7)
    fashion = Sharp(data="fashion-mnist", model=model, steps=500, watch_every=50, eval_every=100)
    return {"digits": digits, "fashion-mnist": fashion}


def main() -> None:
    arguments = grids.options(__doc__, seeds=None).parse_args()
    name, folder = grids.place("sharpness_entropy", arguments)
    results: dict[str, Any] = {"arms": ARMS}
    all_runs: dict[str, list[Traced]] = {}
    for data, recipe in recipes(arguments.quick).items():
        lrs = (1e-3, 3e-2) if arguments.quick else LRS[data]
        seeds = 1 if arguments.quick else arguments.seeds or SEEDS[data]
        all_runs[data] = runs = trained(recipe, lrs, range(seeds), folder / data, arguments.jobs)
        groups = {"all arms": runs} | {arm: [run for run in runs if run.arm == arm] for arm in ARMS}
        results[data] = {
            "correlations": {group: correlations(found) for group, found in groups.items()},
            "runs": [run.row() for run in runs],
        }
        for group, found in results[data]["correlations"].items():
            table(f"{data}, {group}: {len(groups[group])} runs", found)
    picture = sharpness_pictures.draw(name, all_runs["digits"], results["digits"]["correlations"])
    print("written to", measure.write(name, results), picture)


@dataclass(frozen=True)
class Traced:
    """What a run's log says at the steps where the eigenvalues were measured; each of `points` is (measurements,)."""

    arm: str
    lr: float
    seed: int
    status: str
    points: Mapping[str, Floats]

    def at_the_end(self, name: str) -> float:
        return float(self.points[name][-1])

    def at_its_worst(self, name: str) -> float:
        return float(self.points[name].min() if name == "entropy_min" else self.points[name].max())

    def row(self) -> dict[str, Any]:
        points = {name: [float(f"{value:.6g}") for value in values] for name, values in self.points.items()}
        return {"arm": self.arm, "lr": self.lr, "seed": self.seed, "status": self.status, **points}


def trained(recipe: Sharp, lrs: Sequence[float], seeds: Sequence[int], folder: Path, jobs: int | None) -> list[Traced]:
    """Train what is not trained yet, and read the runs; those that diverged before the first measurement are left."""
    tell = grids.teller(len(ARMS) * len(lrs) * len(seeds), folder.name)
    arms = {arm: replace(recipe, stabilizer=stabilizer) for arm, stabilizer in ARMS.items()}
    places = compare(arms, lrs, seeds, folder, jobs=jobs, on_news=tell, hardware=Hardware(accelerator="cpu"))
    runs = []
    for place in places:
        run = read_run(place.folder)
        names = ("step", "entropy_min", "max_logit", RAW, PRECONDITIONED)
        points = np.array([[number(line.get(name)) for name in names] for line in run.lines])
        points = points[np.isfinite(points).all(axis=1)]
        if len(points):
            found = dict(zip(names, points.T, strict=True))
            runs.append(Traced(place.arm, place.recipe.lr, place.recipe.seed, run.result["status"], found))
    return runs


def correlations(runs: Sequence[Traced]) -> dict[str, dict[str, list[float]]]:
    """Every rank correlation with the ends of its interval, by how it is taken and of what with what."""
    lrs = np.array([run.lr for run in runs])
    found: dict[str, dict[str, list[float]]] = {}
    for when in ("at_the_end", "at_its_worst"):
        values = {name: np.array([getattr(run, when)(name) for run in runs]) for name in WITH_LR} | {"lr": lrs}
        plain, given = found.setdefault(when, {}), found.setdefault(f"{when}, given lr", {})
        for x, y in (*PAIRS, *((name, "lr") for name in WITH_LR)):
            plain[f"{x} ~ {y}"] = over_runs(values[x], values[y])
            if y != "lr":
                given[f"{x} ~ {y}"] = over_runs(values[x], values[y], lrs)
    found["within a run"] = {f"{x} ~ {y}": within([(run.points[x], run.points[y]) for run in runs]) for x, y in PAIRS}
    return found


def over_runs(x: Floats, y: Floats, groups: Floats | None = None) -> list[float]:
    return with_interval(lambda i: rank_correlation(x[i], y[i], None if groups is None else groups[i]), len(x))


def table(title: str, found: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    print(f"\n{title}: rank correlation (95 % interval)")
    for how, pairs in found.items():
        for pair, (value, low, high) in pairs.items():
            print(f"  {how:24} {pair:44} {value:+.2f} ({low:+.2f} to {high:+.2f})")


if __name__ == "__main__":
    main()
