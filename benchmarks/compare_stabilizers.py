"""A small ViT under the stabilizers, over learning rates and seeds: digits, or every stabilizer on Fashion-MNIST.

    python benchmarks/compare_stabilizers.py digits    # about 30 minutes on 2 cores; killed, it goes on where it was
    python benchmarks/compare_stabilizers.py fashion   # about an hour
    python benchmarks/compare_stabilizers.py fashion --seeds 1    # the smallest useful table
    python benchmarks/compare_stabilizers.py digits --quick       # every arm, one learning rate, 20 steps: does it run?

All arms: AdamW without decay, batches of 64, constant learning rate, no warmup or clipping, the pre-LN model from
Glorot's start (on the digits the best of those tried at its own best learning rate) unless the arm changes it. Digits:
200 steps; Fashion-MNIST: 500. Every arm is the stabilizer of its name (`trimtab.stabilizers`), and beside these:
  none, N(0, 0.2²)    another start
  none, torch's start PyTorch's own
  sigma               sigma-Reparam with gamma 1 on every layer, weights N(0, 0.4²), no LayerNorm
  sigma, pre-LN       the same with LayerNorm
  init-scale          the control: no LayerNorm, every weight merely starts at W / sigma(W), no reparametrisation
  init-scale, pre-LN  the same with LayerNorm
  deepnorm            post-LN

Prints the final test accuracy, median (lowest-highest) of the seeds, and the lowest entropy any head had in any of
them (0 to 1). Writes results/compare_<task>.json with every run and the measures of the report, and the report's
picture.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grids
import measure

from trimtab.report.compare_page import ComparePage, write_compare_page
from trimtab.report.export import write_png
from trimtab.report.runlog import read_run
from trimtab.tasks.images import vit_digits, vit_fashion
from trimtab.tasks.recipe import Recipe
from trimtab.train.compare import compare
from trimtab.train.compare.grid import RunPlace
from trimtab.train.folder import ERROR
from trimtab.train.hardware import Hardware

LRS = {"digits": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "fashion": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
STEPS = {"digits": 200, "fashion": 500}
SIGMA = "gamma_init=one:init_std=0.4"
BOTH = {
    "none": "none",
    "qk-norm": "qk-norm",
    "softcap": "softcap",
    "qk-clip": "qk-clip",
    "deepnorm": "deepnorm",
    "warmup": "warmup:steps=50",
    "clip": "clip:norm=1.0",
    "init-scale": f"init-scale:{SIGMA}:remove_norms=true",
    "init-scale, pre-LN": f"init-scale:{SIGMA}",
    "sigma": f"sigma:{SIGMA}:remove_norms=true",
    "sigma, pre-LN": f"sigma:{SIGMA}",
}
ARMS = {
    "digits": BOTH | {"none, N(0, 0.2²)": "none", "none, torch's start": "none"},
    "fashion": BOTH
    | {name: name for name in ("spectral-norm", "weight-norm", "layer-scale", "rezero", "z-loss", "muon")},
}
STARTS = {"none, N(0, 0.2²)": {"init": "normal", "init_std": 0.2}, "none, torch's start": {"init": "torch"}}


def arms(task: str, quick: bool) -> dict[str, Recipe]:
    recipe = {"digits": vit_digits, "fashion": vit_fashion}[task]()
    bare = {"warmup_steps": 0, "weight_decay": 0.0, "clip": None, "schedule": "constant"}
    steps = 20 if quick else STEPS[task]
    plain = replace(recipe, **bare, steps=steps, watch_every=10, eval_every=steps)
    found: dict[str, Recipe] = {name: replace(plain, stabilizer=spec) for name, spec in ARMS[task].items()}
    starts = {name: replace(plain, model=replace(plain.model, **STARTS[name])) for name in STARTS if name in found}
    return found | starts


def main() -> None:
    parser = grids.options(__doc__)
    parser.add_argument("task", choices=list(ARMS))
    arguments = parser.parse_args()
    name, folder = grids.place(f"compare_{arguments.task}", arguments)
    chosen = arms(arguments.task, arguments.quick)
    lrs = LRS[arguments.task][3:4] if arguments.quick else LRS[arguments.task]
    seeds = range(1 if arguments.quick else arguments.seeds)
    places = compare(
        chosen,
        lrs,
        seeds,
        folder,
        jobs=arguments.jobs,
        on_news=grids.teller(len(chosen) * len(lrs) * len(seeds)),
        hardware=Hardware(accelerator="cpu"),
        facts={"recipe_name": f"vit-{arguments.task}"},
    )
    runs = {place.name: row(place) for place in places}
    table(runs, list(chosen), lrs)
    page = write_compare_page([folder], folder / "report.html")
    print(f"\n{page.summary}\n")
    results = {
        "recipe": f"vit-{arguments.task}",
        "arms": ARMS[arguments.task],
        "measures": measures(page),
        "runs": runs,
    }
    path = measure.write(name, results)
    write_png(path.with_suffix(".png"), page.groups[0][0])
    print(f"written to {path}, its picture beside it; the report: {page.path}")


def row(place: RunPlace) -> dict[str, Any]:
    """How a run ended, and the extremes that its heads reached at any logged step."""
    facts = {"arm": place.arm, "lr": place.recipe.lr, "seed": place.recipe.seed}
    if (place.folder / ERROR).exists():
        return facts | json.loads((place.folder / ERROR).read_text(encoding="utf8"))
    run = read_run(place.folder)
    low, high = run.column("entropy_min"), run.column("max_logit")
    return facts | {
        "status": run.result["status"],
        "accuracy": run.result["metrics"].get("accuracy"),
        "eval_loss": run.result["metrics"].get("eval_loss"),
        "entropy_min": min((value for value in low if value == value), default=None),
        "max_logit": max((value for value in high if value == value), default=None),
        "step_seconds": run.result["step_seconds"],
    }


def measures(page: ComparePage) -> list[dict[str, Any]]:
    """What the report measures: by arm, with its 95 % interval, and the pairs of arms that the seeds tell apart."""
    return [
        {
            "measure": measured.measure.name,
            "meaning": measured.measure.meaning,
            "arms": {arm: [value, *measured.intervals[arm]] for arm, value in measured.values.items()},
            "told_apart": [
                f"{each.first} | {each.second}: {each.value:+.4g}" for each in measured.differences if each.told
            ],
        }
        for _, group in page.groups
        for measured in group
    ]


def table(runs: dict[str, dict[str, Any]], names: Sequence[str], lrs: Sequence[float]) -> None:
    print("final test accuracy: median (lowest-highest) of the seeds, and the lowest entropy any head had (0 to 1)")
    print(f"{'':20}" + "".join(f"{lr:>26g}" for lr in lrs))
    for arm in names:
        cells = []
        for lr in lrs:
            found = [run for run in runs.values() if run["arm"] == arm and run["lr"] == lr]
            accuracy = [run["accuracy"] for run in found if run.get("accuracy") is not None]
            entropy = [run["entropy_min"] for run in found if run.get("entropy_min") is not None]
            cell = f"{sum('error' in run for run in found)} failed" if len(accuracy) < len(found) else ""
            if accuracy:
                cell += f" {statistics.median(accuracy):.2f} ({min(accuracy):.2f}-{max(accuracy):.2f})"
            cells.append(f"{cell} {min(entropy):.3f}" if entropy else cell)
        print(f"{arm:20}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
