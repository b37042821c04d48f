"""The digits ViT over learning rates: plain, tuned, controlled, steadied. README and demo claim what it prints.

    python benchmarks/digits_lr.py                # about 20 minutes on 2 cores; killed, it goes on where it was
    python benchmarks/digits_lr.py --seeds 2      # the smallest useful table

Arms, all AdamW without decay, 200 steps of 64 images, constant learning rate unless said:
  pre-LN               the plain model, from Glorot's start: the best of those tried at its own best learning rate
  pre-LN, N(0,0.2²)    the same from another plain start: the best of those tried at the high learning rates
  pre-LN, torch        the same from torch's own start
  pre-LN, warmup       pre-LN with 50 steps of linear warmup
  pre-LN, clip         the same with gradients clipped to norm 1
  sigma                sigma-Reparam with gamma 1 on every layer, weights N(0, 0.4²), no LayerNorm
  sigma, pre-LN        the same with LayerNorm
  init scale           the control: no LayerNorm, every weight merely starts at W / sigma(W), no reparametrisation
  init scale, pre-LN   the same with LayerNorm

Writes results/digits_lr.json: the final test accuracy of every run, the lowest entropy a head had in it (0 to 1).
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import measure
import torch

from trimtab.report.runlog import read_run
from trimtab.tasks.images.recipes import ImagesRecipe, vit_digits
from trimtab.train import train

LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def arms() -> dict[str, ImagesRecipe]:
    plain = replace(vit_digits(), watch_every=10, eval_every=200)
    bare = replace(plain.model, norm="none", init="normal", init_std=0.4)
    normed = replace(bare, norm="pre")
    return {
        "pre-LN": plain,
        "pre-LN, N(0,0.2²)": replace(plain, model=replace(plain.model, init="normal", init_std=0.2)),
        "pre-LN, torch": replace(plain, model=replace(plain.model, init="torch")),
        "pre-LN, warmup": replace(plain, warmup_steps=50),
        "pre-LN, clip": replace(plain, clip=1.0),
        "sigma": replace(plain, model=bare, stabilizer="sigma:gamma_init=one"),
        "sigma, pre-LN": replace(plain, model=normed, stabilizer="sigma:gamma_init=one"),
        "init scale": replace(plain, model=bare, stabilizer="init-scale:gamma_init=one"),
        "init scale, pre-LN": replace(plain, model=normed, stabilizer="init-scale:gamma_init=one"),
    }


def run(recipe: ImagesRecipe) -> tuple[float, float]:
    """Return the final test accuracy and the lowest normalised entropy of any head at any logged step."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        result = train(recipe, folder / "run", on_step=lambda progress: None)
        entropy = read_run(folder / "run").column("entropy_min")
        return result.metrics["accuracy"], float(entropy[~(entropy != entropy)].min(initial=math.inf))
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    path = measure.RESULTS / "digits_lr.json"
    runs: dict[str, list[float]] = json.loads(path.read_text())["runs"] if path.exists() else {}
    wanted = {
        f"{arm} | {lr:g} | {seed}": replace(recipe, lr=lr, seed=seed)
        for seed in range(arguments.seeds)  # seed by seed, so that a part is a table too
        for arm, recipe in arms().items()
        for lr in LRS
    }
    missing = {key: recipe for key, recipe in wanted.items() if key not in runs}
    print(f"{len(wanted) - len(missing)} runs known, {len(missing)} to do", flush=True)
    with ProcessPoolExecutor(max_workers=2) as pool:
        for key, outcome in zip(missing, pool.map(run, missing.values()), strict=True):
            runs[key] = list(outcome)
            measure.write("digits_lr", {"runs": runs})
    table(runs, arguments.seeds)


def table(runs: dict[str, list[float]], seeds: int) -> None:
    print("final test accuracy: median (lowest-highest) of the seeds, and the lowest entropy any head had (0 to 1)")
    print(f"{'':20}" + "".join(f"{lr:>26g}" for lr in LRS))
    for arm in arms():
        cells = []
        for lr in LRS:
            found = [runs[key] for seed in range(seeds) if (key := f"{arm} | {lr:g} | {seed}") in runs]
            accuracy = [each[0] for each in found]
            cells.append(
                f"{statistics.median(accuracy):.2f} ({min(accuracy):.2f}-{max(accuracy):.2f}) "
                f"{min(each[1] for each in found):.3f}"
            )
        print(f"{arm:20}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
