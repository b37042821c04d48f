"""Images/s of the loaders alone, and of a training step through the engine beside a bare loop of the same model.

    python benchmarks/images_throughput.py            about ten minutes on two cores; on a GPU where there is one
    python benchmarks/images_throughput.py --quick    does it run?

The loaders: a folder of JPEG files as large as ImageNet's (500×375, about 100 kB; made on the fly), in the random view
of training, in the plain one of evaluation, and as it is looked at when it is new; Fashion-MNIST and CIFAR-10, which
are in memory; and fake ImageNet. The steps: the engine (watch off) and a loop written by hand, of the same model on
the same batches, take turns in one process, so that what slows the machine down slows both.

Prints and writes results/images_throughput.json and .png: medians with the smallest and largest of the rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from matplotlib.figure import Figure
from pictures import INK, dress
from PIL import Image

from trimtab.models import vit_config
from trimtab.tasks.images import ImagesRecipe, load_images, vit_fashion
from trimtab.tasks.images.sets import Split
from trimtab.tasks.images.sets.listing import list_images
from trimtab.tasks.images.sets.unreadable import decode_all
from trimtab.train import Hardware, Progress, train
from trimtab.train.order import batches

Clock = Callable[[], float]
BATCH = 64


def make_folder(root: Path, train_images: int) -> None:
    """JPEGs of 500×375: coarse noise made smooth, with some fine noise on it, so that they pack as photographs do."""
    random = np.random.RandomState(0)
    for split, count in (("train", train_images), ("val", BATCH)):
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count // 2):
                coarse = Image.fromarray(random.randint(0, 256, (24, 32, 3)).astype(np.uint8))
                smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
                pixels = (smooth + random.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.JPEG", quality=92)


def loaders(folder: Path) -> dict[str, Callable[[], int]]:
    """Name to a function that loads some images and returns how many."""
    photographs, fake = load_images(str(folder)), load_images("fake-imagenet")
    generator = torch.Generator().manual_seed(0)

    def some(split: Split, generator: torch.Generator | None, count: int) -> Callable[[], int]:
        order = batches(split.size, BATCH, seed=0)

        def load() -> int:
            for _ in range(count):
                split.read(next(order), generator)
            return count * BATCH

        return load

    found = {
        "JPEG folder, 224 px, training": some(photographs.train, generator, 1),
        "JPEG folder, 224 px, evaluation": some(photographs.train, None, 1),
        "JPEG folder, looked at when new": lambda: len(decode_all(list_images(folder)[1])) + BATCH,
        "fake ImageNet, 224 px": some(fake.train, generator, 4),
    }
    for title, name in (("Fashion-MNIST, 28 px", "fashion-mnist"), ("CIFAR-10, 32 px", "cifar10-jpeg")):
        found[title] = some(load_images(name).train, generator, 200)
    return found


def loader_rows(folder: Path, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    functions = loaders(folder)
    speeds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):  # in turn; the first round warms up
        for name, load in functions.items():
            began = clock()
            count = load()
            if number:
                speeds[name].append(count / (clock() - began))
    return [{"loader": name, "images_per_second": each} for name, each in speeds.items()]


def bare_loop(recipe: ImagesRecipe, device: str) -> Callable[[int], None]:
    """What one would write by hand; the function that it returns takes so many steps."""
    torch.manual_seed(recipe.seed)
    task = recipe.task()
    model = task.model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    order = batches(task.train.size, recipe.batch_size, recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)

    def steps(count: int) -> None:
        for _ in range(count):
            batch = tuple(each.to(device) for each in task.train.batch(next(order), generator))
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return steps


def turns(recipe: ImagesRecipe, block: int, rounds: int, device: str, clock: Clock) -> list[tuple[float, float]]:
    """Images/s of the bare loop and of the engine, turn by turn: one waits while the other takes `block` steps."""
    recipe = replace(
        recipe,
        watch=False,
        clip=None,
        steps=block * (rounds + 3),
        watch_every=block,
        eval_every=10**6 * block,
        checkpoint_every=10**9,
    )
    bare = bare_loop(recipe, device)
    images = block * recipe.batch_size
    found: list[tuple[float, float]] = []
    since: list[float] = []

    def take_turns(progress: Progress) -> None:
        ours = clock() - since[-1] if since else None
        began = clock()
        bare(block)
        theirs = clock() - began
        if ours is not None and 2 * block < progress.step < recipe.steps:  # warm, and no end
            found.append((images / theirs, images / ours))
        since.append(clock())

    with tempfile.TemporaryDirectory() as folder:
        train(recipe, folder, take_turns, hardware=Hardware(accelerator="gpu" if device == "cuda" else "cpu"))
    return found


def steps(folder: Path, device: str, quick: bool) -> dict[str, tuple[ImagesRecipe, int]]:
    """Name to recipe and steps of a turn."""
    large = vit_config("Ti", num_classes=2, depth=1 if quick else 12)
    batch = 256 if device == "cuda" else 8
    photographs = replace(vit_fashion(), data=str(folder), model=large, batch_size=batch, warmup_steps=1)
    return {
        "ViT of vit-fashion, 28 px": (replace(vit_fashion(), warmup_steps=1), 2 if quick else 20),
        f"ViT-Ti{'/16' if not quick else ', depth 1'}, JPEG folder": (photographs, 1 if quick else 2),
    }


def step_rows(folder: Path, rounds: int, device: str, quick: bool, clock: Clock) -> list[dict[str, Any]]:
    rows = []
    for name, (recipe, block) in steps(folder, device, quick).items():
        found = turns(recipe, block, rounds, device, clock)
        bare, engine = (list(column) for column in zip(*found, strict=True))
        ratios = [ours / theirs for theirs, ours in found]
        rows.append({"step": name, "batch_size": recipe.batch_size, "bare": bare, "engine": engine, "ratios": ratios})
    return rows


def picture(rows: list[dict[str, Any]], unit: str) -> Figure:
    """Left the loaders, right the engine's images/s over those of the bare loop, round by round."""
    loading, stepping = ([row for row in rows if kind in row] for kind in ("loader", "step"))
    figure = Figure(figsize=(9, 3), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, row in enumerate(reversed(loading)):
        each = row["images_per_second"]
        left.plot([min(each), max(each)], [place, place], color="#4c78a8", linewidth=5, alpha=0.4)
        left.plot(statistics.median(each), place, "|", color=INK, markersize=12, markeredgewidth=2)
        text = f"{statistics.median(each):,.0f}"
        left.annotate(text, (max(each), place), (6, -3), textcoords="offset points", size=7, color=INK)
    left.set_yticks(range(len(loading)), [row["loader"] for row in reversed(loading)])
    left.set_xscale("log")
    left.set_xlim(100, 3e7)
    left.set_ylim(-0.7, len(loading) - 0.3)
    left.set_xlabel(f"{unit}, the loader alone", fontsize=8, color=INK)
    for place, row in enumerate(reversed(stepping)):
        right.plot(row["ratios"], [place] * len(row["ratios"]), ".", color="#4c78a8", alpha=0.4)
        right.plot(statistics.median(row["ratios"]), place, "|", color=INK, markersize=22, markeredgewidth=2)
    right.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    right.set_yticks(range(len(stepping)), [row["step"] for row in reversed(stepping)])
    right.set_ylim(-0.7, len(stepping) - 0.3)
    right.set_xlabel("engine's images/s over the bare loop's; bar: median", fontsize=8, color=INK)
    for axes in (left, right):
        dress(axes)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time: on a machine with other work")
    options = parser.parse_args()
    clock: Clock = time.process_time if options.busy else time.perf_counter
    unit = "images per processor second" if options.busy else "images/s"
    if options.busy:
        torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = 2 if options.quick else options.rounds
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        folder = Path(place, "photographs")
        make_folder(folder, BATCH if options.quick else 8 * BATCH)
        rows = loader_rows(folder, rounds, clock) + step_rows(folder, rounds, device, options.quick, clock)
    print(f"{unit}, on {device}: median (smallest-largest)")
    for row in rows:
        if "loader" in row:
            print(f"{row['loader']:34} {numbers(row['images_per_second'])}")
        else:
            print(f"{row['step']:34} bare {numbers(row['bare'])}, engine {numbers(row['engine'])}")
            print(f"{'':34} engine / bare {measure.spread(row['ratios'])}")
    if not options.quick:
        results = {"seconds": time.perf_counter() - began, "unit": unit, "device": device, "rows": rows}
        print(measure.write("images_throughput", results))
        picture(rows, unit).savefig(measure.RESULTS / "images_throughput.png")


def numbers(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


if __name__ == "__main__":
    main()
