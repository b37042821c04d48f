"""Encoder-decoders of one depth, without warmup, to a real BLEU: the arms of depth.py, each tuned for the length.

    python benchmarks/depth_bleu.py 6            # after depth.py --depths 6; about 15 minutes on 2 idle cores
    python benchmarks/depth_bleu.py 6 --seeds 3
    python benchmarks/depth_bleu.py 6 --gpu      # after depth.py --depths 6 --gpu
    python benchmarks/depth_bleu.py 2 --quick    # after depth.py --quick: 20 steps, greedy: does it run?

Models and data are those of depth.py; 3,000 steps of Adam with a cosine to zero. Each arm trains with seed 0 at its
best learning rate of depth.py and at those beside it; at the one with the lowest validation loss all seeds are then
trained, and their translations of the test part scored. Prints the validation losses and the BLEUs, and writes
results/depth_bleu.json, in which other depths of as many steps stay.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import depth as depth_table
import grids
import measure

from trimtab.report.runlog import read_run
from trimtab.train.compare.grid import RunPlace, plan
from trimtab.train.compare.running import run_places


def main() -> None:
    parser = grids.options(__doc__, seeds=1, gpu=True)
    parser.add_argument("depth", type=int, help="blocks of the encoder, and of the decoder")
    parser.add_argument("--steps", type=int, help="3,000 by default")
    arguments = parser.parse_args()
    depth, steps = arguments.depth, 20 if arguments.quick else arguments.steps or 3000
    before, _ = grids.place("depth", arguments)
    table = measure.read(before).get("table", [])
    best = {e["arm"]: e["best_lr"] for e in table if e["depth"] == depth}
    if not best:
        raise SystemExit(f"the table has no depth of {depth}: python benchmarks/depth.py --depths {depth} comes first")
    name, folder = grids.place("depth_bleu", arguments)
    size = depth_table.SIZE_GPU if arguments.gpu else depth_table.SIZE
    recipes = {
        arm: replace(recipe, schedule="cosine") for arm, recipe in depth_table.arms(depth, "adam", steps, size).items()
    }
    tuning = [
        place
        for arm, recipe in recipes.items()
        for place in plan({arm: recipe}, beside(best[arm]), [0], folder / str(depth) / "tuning")
    ]
    train_all(tuning, f"{depth} tuning", arguments)
    tuned = {arm: lowest([place for place in tuning if place.arm == arm]) for arm in recipes}
    tested = {arm: replace(recipe, decode="test", beam=1 if arguments.quick else 4) for arm, recipe in recipes.items()}
    places = [
        place
        for seed in range(arguments.seeds)
        for arm, recipe in tested.items()
        for place in plan({arm: recipe}, [tuned[arm]], [seed], folder / str(depth))
    ]
    train_all(places, str(depth), arguments)
    runs = [bleu_row(place) for place in places]
    tried = [
        {"arm": place.arm, "depth": depth, "lr": place.recipe.lr, "loss": depth_table.loss_of(place)}
        for place in tuning
    ]
    earlier = measure.read(name)
    if earlier.get("steps") == steps:
        runs = [run for run in earlier["runs"] if run["depth"] != depth] + runs
        tried = [run for run in earlier.get("tuning", []) if run["depth"] != depth] + tried
    print(f"\n{steps:,} steps, cosine to zero: validation loss by learning rate")
    for arm in recipes:
        losses = "".join(
            f"{run['lr']:>9g} {run['loss']:.2f}" for run in tried if (run["depth"], run["arm"]) == (depth, arm)
        )
        print(f"{depth}+{depth} {arm:12}{losses}")
    print("\nbeam of 4, greedy with --quick; test_2016_flickr")
    for run in sorted(runs, key=lambda run: run["depth"]):
        score = "-" if run["bleu"] is None else f"{run['bleu']:.1f}"
        print(f"{run['depth']}+{run['depth']} {run['arm']:12} lr {run['lr']:g} seed {run['seed']}: BLEU {score}")
    print(f"written to {measure.write(name, {'steps': steps, 'tuning': tried, 'runs': runs})}")


def train_all(places: Sequence[RunPlace], title: str, options: Namespace) -> None:
    run_places(
        places,
        jobs=options.jobs,
        on_news=grids.teller(len(places), title),
        hardware=grids.hardware(options),
        facts=depth_table.FACTS,
    )


def beside(lr: float) -> list[float]:
    """A learning rate of the grid and its neighbours there; of one that is not in it, itself."""
    grid = depth_table.LRS["adam"]
    return [each for i, each in enumerate(grid) if abs(i - grid.index(lr)) <= 1] if lr in grid else [lr]


def lowest(places: Sequence[RunPlace]) -> float:
    """The learning rate of the run with the lowest validation loss."""
    return min(places, key=depth_table.loss_of).recipe.lr


def bleu_row(place: RunPlace) -> dict[str, Any]:
    result = read_run(place.folder).result or {"status": "error"}
    test = result.get("test", {})
    return {
        "arm": place.arm,
        "depth": place.recipe.model.encoder_depth,  # type: ignore[attr-defined]
        "lr": place.recipe.lr,
        "seed": place.recipe.seed,
        "status": result["status"],
        "bleu": test.get("bleu"),
        "loss": test.get("eval_loss"),
    }


if __name__ == "__main__":
    main()
