"""What the training loop itself costs over a bare hand-written loop of the same model, data and optimiser; Watch off.

Both train in one process, in turns of some steps: between two lines of its log the loop stands still, and the bare
loop takes as many steps. So whatever slows the machine down slows both.

    python benchmarks/loop_cost.py            two models, about five minutes on two cores
    python benchmarks/loop_cost.py --quick    some seconds
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from measure import spread, write

from trimtab.tasks.images import ImagesRecipe, vit_digits
from trimtab.tasks.recipe import Recipe
from trimtab.train import Progress, train
from trimtab.train.order import batches

LIMIT = 1.03


def bare_loop(recipe: Recipe) -> Callable[[int], None]:
    """What one would write by hand; the function that it returns takes so many steps."""
    torch.manual_seed(recipe.seed)
    task = recipe.task()
    task.model.train()
    optimizer = torch.optim.AdamW(task.model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    order = batches(task.train.size, recipe.batch_size, recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)

    def steps(count: int) -> None:
        for _ in range(count):
            loss = task.loss(task.model, task.train.batch(next(order), generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


def turns(recipe: Recipe, block: int, rounds: int, clock: Callable[[], float]) -> list[tuple[float, float]]:
    """Milliseconds a step of the bare loop and of ours, turn by turn."""
    recipe = replace(
        recipe, watch=False, steps=block * rounds, watch_every=block, eval_every=10**6 * block, checkpoint_every=10**9
    )
    bare = bare_loop(recipe)
    found: list[tuple[float, float]] = []
    since: list[float] = []

    def take_turns(progress: Progress) -> None:
        ours = (clock() - since[-1]) / block if since else None
        began = clock()
        bare(block)
        theirs = (clock() - began) / block
        if ours is not None and progress.step > 2 * block and progress.step < recipe.steps:  # warm, and no end
            found.append((1e3 * theirs, 1e3 * ours))
        since.append(clock())

    with tempfile.TemporaryDirectory() as folder:
        train(recipe, folder, take_turns)
    return found


def models() -> dict[str, tuple[ImagesRecipe, int]]:
    """Name to recipe and steps of a turn."""
    digits = vit_digits()
    larger = replace(digits, model=replace(digits.model, dim=256))
    return {"digits ViT": (digits, 20), "ViT, dim 256": (larger, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few turns, of the first model")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time: on a machine with other work")
    options = parser.parse_args()
    clock = time.process_time if options.busy else time.perf_counter
    if options.busy:
        torch.set_num_threads(1)
    rows = []
    print(f"{'model':<14} {'parameters':>10} {'bare ms':>9} {'ours ms':>9}   ours / bare (smallest-largest)")
    for name, (recipe, block) in models().items():
        found = turns(recipe, block, 10 if options.quick else 60, clock)
        each = [ours / bare for bare, ours in found]
        bare_ms, ours_ms = (statistics.median(column) for column in zip(*found, strict=True))
        parameters = sum(p.numel() for p in recipe.task().model.parameters())
        print(f"{name:<14} {parameters:>10,} {bare_ms:>9.2f} {ours_ms:>9.2f}   {spread(each)}")
        rows.append({"model": name, "parameters": parameters, "bare_ms": bare_ms, "ours_ms": ours_ms, "ratios": each})
        if options.quick:
            break
    if not options.quick:
        print("written to", write("loop_cost", {"limit": LIMIT, "clock": clock.__name__, "rows": rows}))


if __name__ == "__main__":
    main()
