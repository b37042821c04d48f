"""How large a step is, against the width: the spectral norm of updates and of weights under Adam and SGD.

    python benchmarks/update_norms.py                  # about 30 minutes on 2 cores; killed, it goes on where it was
    python benchmarks/update_norms.py --widest 512     # the smallest useful table, minutes
    python benchmarks/update_norms.py --quick          # widths 64 and 128, few batches: does it run?

Proposition 3.2 of Zhai et al. (arXiv 2303.06296): an idealised Adam step E[g] / sqrt(E[g²]) on a w × w matrix has a
spectral norm of at least sqrt(w) sqrt(1 - mean(n² / (mu² + n²))), with mu and n² the mean and the variance of each
entry's gradient. (That is its Frobenius norm over sqrt(w).) So under Adam steps grow with the square root of the width,
as long as noise does not dominate; SGD's do not have to.

A ViT of one pre-LN block on Fashion-MNIST (patches of 14, MLP as wide as the model, so that query, key, value, out, up
and down are all w × w), Glorot's start, widths 64 to 2048. Measured over many batches of 64:
  ideal    |E[g] / sqrt(E[g²])|, which the bound is about; asserted to lie above it
  single   |g / sqrt(E[g²])| of one batch: Adam without a momentum
  SGD      |g| of one batch
at the start and after 100 steps of Adam; and the spectral norm of the weights over 100 steps of Adam (lr 1e-3) and SGD
(lr 0.1) at every width. With mu from N batches pure noise would still show a bound of sqrt(w / N).

Slopes are those of log norm against log width, geometric mean of the six matrices, with 95 % t intervals over seeds.
Writes results/update_norms.json and .png.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grids
import measure
import numpy as np
import torch
import update_norms_picture
from safetensors.torch import load_file
from torch import Tensor

from trimtab.models.vit import ViTConfig
from trimtab.report.runlog import read_run
from trimtab.spectral import spectral_norm
from trimtab.tasks.images import ImagesRecipe
from trimtab.tasks.task import Task
from trimtab.train.compare import compare
from trimtab.train.hardware import Hardware
from trimtab.train.order import batches

WIDTHS = (64, 128, 256, 512, 1024, 2048)
MATRICES = ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")
LRS = {"adam": 1e-3, "sgd": 0.1}
MEASURED = ("ideal", "bound", "single", "sgd")


@dataclass(frozen=True, kw_only=True)
class Unmeasured(ImagesRecipe):
    """The images task without its evaluation: only the weights are of interest."""

    def task(self) -> Task:
        return replace(super().task(), evaluation=None)


def recipe(width: int, quick: bool) -> Unmeasured:
    model = ViTConfig(
        image_size=28,
        patch_size=14,
        in_channels=1,
        num_classes=10,
        dim=width,
        depth=1,
        num_heads=4,
        mlp_ratio=1,
        init="xavier",
        position_std=0.5,
    )
    steps, every = (10, 5) if quick else (100, 10)
    return Unmeasured(
        data="fashion-mnist", model=model, steps=steps, watch_every=every, eval_every=every, keep=1, momentum=0.0
    )


def adam_update_norm_bound(mean: Tensor, variance: Tensor) -> Tensor:
    """The least spectral norm of an idealised Adam step E[g] / sqrt(E[g²]), (): proposition 3.2, for any shape.

    A matrix of rank r and Frobenius norm F has a spectral norm of at least F / sqrt(r). Entries that are always zero
    take no step.

    Args:
        mean: of each entry's gradient, (rows, columns).
        variance: of each entry's gradient, the same shape.
    """
    second = mean.square() + variance
    signal = torch.where(second > 0, mean.square() / second, 0.0)  # 1 - n² / (mu² + n²)
    return (max(mean.shape) * signal.mean()).sqrt()


def main() -> None:
    parser = grids.options(__doc__, seeds=3)
    parser.add_argument("--widest", type=int, default=2048)
    arguments = parser.parse_args()
    name, folder = grids.place("update_norms", arguments)
    widths = [width for width in WIDTHS if width <= (128 if arguments.quick else arguments.widest)]
    seeds = range(2 if arguments.quick else arguments.seeds)
    count = 4 if arguments.quick else 64

    sigmas = {optimizer: train(optimizer, widths, seeds, folder, arguments.quick, arguments.jobs) for optimizer in LRS}
    rows = measure.rows_so_far(name)
    for seed in seeds:
        for width in widths:
            for when in ("start", "trained"):
                key = f"width {width} seed {seed} {when}, {count} batches"
                if key not in rows:
                    weights = None if when == "start" else trained_weights(folder / "adam", width, seed)
                    numbers = update_norms(recipe(width, arguments.quick), seed, count, weights)
                    rows[key] = {"width": width, "seed": seed, "when": when, "norms": numbers}
                    measure.write(name, {"rows": rows})
                    print(key, {each: f"{value:.3g}" for each, value in together(rows[key]).items()}, flush=True)
    wanted = [row for row in rows.values() if row["width"] in widths and row["seed"] in seeds]
    results = {"batches": count, "lrs": LRS, "slopes": slopes(wanted, sigmas), "rows": rows, "sigma": sigmas}
    for what, (mean, low, high) in results["slopes"].items():
        print(f"{what:40} slope {mean:+.2f} ({low:+.2f} to {high:+.2f})")
    picture = update_norms_picture.draw(name, [{**row, **together(row)} for row in wanted], sigmas)
    print("written to", measure.write(name, results), picture)


def train(
    optimizer: str, widths: Sequence[int], seeds: Sequence[int], folder: Path, quick: bool, jobs: int | None
) -> list[dict[str, Any]]:
    """Train every width; the spectral norm of the six matrices, geometric mean, at every logged step."""
    arms = {f"width {width}": replace(recipe(width, quick), optimizer=optimizer) for width in widths}
    hardware = Hardware(accelerator="cpu")
    places = compare(arms, [LRS[optimizer]], seeds, folder / optimizer, jobs=jobs, hardware=hardware)
    found = []
    for place in places:
        run = read_run(place.folder)
        sigmas = [geometric([line["sigma"][f"blocks.0.{name}.weight"][0] for name in MATRICES]) for line in run.lines]
        row = {"width": place.recipe.model.dim, "seed": place.recipe.seed, "status": run.result["status"]}
        found.append({**row, "steps": run.steps.tolist(), "sigma": sigmas})
        print(f"{optimizer} {place.name}: {run.result['status']}, spectral norm {sigmas[0]:.2f} to {sigmas[-1]:.2f}")
    return found


def trained_weights(folder: Path, width: int, seed: int) -> dict[str, Tensor]:
    """The weights at the end of a run of `train`."""
    runs = (folder / "runs" / f"width_{width}").glob(f"lr*-seed{seed}/checkpoints/step-*/model.safetensors")
    return load_file(max(runs))


def update_norms(
    wanted: ImagesRecipe, seed: int, count: int, weights: dict[str, Tensor] | None
) -> dict[str, dict[str, float]]:
    """For each of the six matrices the four numbers of `MEASURED`, from the gradients of many batches.

    Raises:
        AssertionError: an idealised step is shorter than proposition 3.2 allows.
    """
    torch.manual_seed(seed)
    task = wanted.task()
    if weights is not None:
        task.model.load_state_dict(weights)
    matrices = {name: task.model.get_parameter(f"blocks.0.{name}.weight") for name in MATRICES}
    first = {name: torch.zeros_like(matrix) for name, matrix in matrices.items()}
    second = {name: torch.zeros_like(matrix) for name, matrix in matrices.items()}
    order = batches(task.train.size, wanted.batch_size, seed)
    for _ in range(count):
        loss = task.loss(task.model, task.train.batch(next(order), torch.Generator().manual_seed(seed)))
        gradients = dict(zip(MATRICES, torch.autograd.grad(loss, list(matrices.values())), strict=True))
        for name, gradient in gradients.items():
            first[name] += gradient / count
            second[name] += gradient.square() / count
    norms = {}
    for name in MATRICES:
        mean, scale = first[name], second[name].sqrt()
        ideal, single = (torch.where(scale > 0, g / scale, 0.0) for g in (mean, gradients[name]))
        bound = adam_update_norm_bound(mean, (second[name] - mean.square()).clamp(min=0))
        steps = (spectral_norm(ideal)[0], bound, spectral_norm(single)[0], spectral_norm(gradients[name])[0])
        norms[name] = dict(zip(MEASURED, map(float, steps), strict=True))
        assert norms[name]["ideal"] >= norms[name]["bound"] * (1 - 1e-4), (name, norms[name])  # float32 moments
    return norms


def together(row: dict[str, Any]) -> dict[str, float]:
    """Each number of `MEASURED`, geometric mean of the six matrices."""
    return {each: geometric([norms[each] for norms in row["norms"].values()]) for each in MEASURED}


def geometric(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def slopes(rows: Sequence[dict[str, Any]], sigmas: dict[str, list[dict[str, Any]]]) -> dict[str, Sequence[float]]:
    """Of log norm against log width: mean of the seeds, with its interval; of weights, of how far sigma has moved."""
    points: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for row in rows:
        for each, value in together(row).items():
            points.setdefault(f"{each}, {row['when']}", {}).setdefault(row["seed"], []).append((row["width"], value))
    for optimizer, runs in sigmas.items():
        for run in runs:
            growth = abs(run["sigma"][-1] - run["sigma"][0])
            of_seed = points.setdefault(f"change of sigma, {optimizer}", {}).setdefault(run["seed"], [])
            of_seed.append((run["width"], growth))
    return {
        what: measure.t_interval([slope(*zip(*pairs, strict=True)) for pairs in of_seeds.values()])
        for what, of_seeds in points.items()
    }


def slope(widths: Sequence[int], norms: Sequence[float]) -> float:
    return float(np.polyfit(np.log(widths), np.log(norms), 1)[0])


if __name__ == "__main__":
    main()
