"""Is loading the bottleneck? Samples/s of the loader alone beside those of the training step it feeds.

    python benchmarks/loader_speed.py            # about a minute; needs TRIMTAB_DATA for vit-fashion
    python benchmarks/loader_speed.py --quick    # does it run?

For each recipe, in one process with one thread: the loader of the engine (order, indexing) and a bare
step of the model on those batches (forward, backward, AdamW), in turn, round by round; and how long the data take to
open: the first time ever, when they are decoded and prepared, and after that.

Prints and writes results/loader_speed.json: medians with the smallest and largest of the rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import measure
import torch
from lightning_fabric import Fabric

from trimtab.tasks.images import ImagesRecipe, load_images, vit_digits, vit_fashion
from trimtab.train.loader import Loader

RECIPES = {"vit-digits": vit_digits, "vit-fashion": vit_fashion}


def row(recipe: ImagesRecipe, rounds: int, steps: int) -> dict[str, Any]:
    """Measure one recipe, with an empty cache at first."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        first = seconds(lambda: load_images(recipe.data))
        later = statistics.median(seconds(lambda: load_images(recipe.data)) for _ in range(5))
        torch.manual_seed(0)
        task = recipe.task()
        batches = Loader(task.train, recipe, Fabric(accelerator="cpu", devices=1)).batches(1)
        optimizer = torch.optim.AdamW(task.model.parameters(), recipe.lr, fused=True)

        def load() -> None:
            for _ in range(10 * steps):
                next(batches)

        def train() -> None:
            for batch in ready:
                loss = task.loss(task.model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        ready = [next(batches)[0] for _ in range(steps)]
        train()
        loader, step = [], []
        for _ in range(rounds):  # in turn, so that a drift of the machine's speed favours neither
            loader.append(10 * steps * recipe.batch_size / seconds(load))
            step.append(steps * recipe.batch_size / seconds(train))
    return {
        "first_open_seconds": first,
        "later_open_seconds": later,
        "loader_samples_per_second": loader,
        "step_samples_per_second": step,
        "loader_over_step": [fast / slow for fast, slow in zip(loader, step, strict=True)],
    }


def seconds(function: Callable[[], object]) -> float:
    return measure.timed(function, "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rounds, steps = (2, 3) if arguments.quick else (arguments.rounds, 30)
    began = time.perf_counter()
    rows = {}
    print(f"{'recipe':12} {'open, first / later':>22} {'loader, samples/s':>30} {'step, samples/s':>24} {'ratio':>6}")
    for name, make in RECIPES.items():
        rows[name] = found = row(make(), rounds, steps)
        opened = f"{found['first_open_seconds']:.3f} / {found['later_open_seconds']:.3f} s"
        loader, step = (numbers(found[f"{what}_samples_per_second"]) for what in ("loader", "step"))
        print(f"{name:12} {opened:>22} {loader:>30} {step:>24} {statistics.median(found['loader_over_step']):6.0f}")
    if not arguments.quick:
        print(measure.write("loader_speed", {"seconds": time.perf_counter() - began, "rows": rows}))


def numbers(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


if __name__ == "__main__":
    main()
