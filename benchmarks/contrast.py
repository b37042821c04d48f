"""Contrastive pre-training over learning rates and seeds: which arm trains, and what its features are worth.

    python benchmarks/contrast.py                # 90 runs, about 40 minutes on 2 cores; killed, it goes on
    python benchmarks/contrast.py --seeds 1      # the smallest useful table
    python benchmarks/contrast.py --quick        # every arm, one learning rate, one seed, 10 steps: does it run?

SimCLR with a small ViT on Fashion-MNIST, without labels: 400 steps of 64 images, cosine, LARS (with which a step moves
each weight by lr × 0.1 of its size, its share, before momentum). The arms differ in nothing but:

  pre-LN          LayerNorm, warmup of 40 steps
  frozen patches  the same with the frozen patch embedding of MoCo v3
  sigma           sigma-Reparam with gamma 1, no LayerNorm, no warmup
  sigma, pre-LN   sigma-Reparam with gamma 1 and LayerNorm, no warmup
  init-scale      the control: LayerNorm, warmup, and weights that merely start at W / sigma(W)
  plain           neither LayerNorm nor sigma-Reparam, warmup

Every arm has the same settings to be tuned over: the learning rates, each with all seeds. 5,000 training images are
held out; a linear probe and nearest neighbours that know the labels of 5,000 others are measured on them, and choose
each arm's learning rate. On the test images every run is measured once.

Where the grid lies comes from trial runs: 300 steps of 64 images, seed 0, probe and neighbours with 1,500 labels;
held-out accuracies of the probe, from random to trained features, and of the neighbours at the end:

  pre-LN            AdamW at lr 3e-3     .681 to .763, .600
  pre-LN            lr 0.02, share .002  .693 to .760, .654 (2,000 labels)
  pre-LN            lr 0.02, share .006  .681 to .719, .565
  sigma, pre-LN     lr 0.02, share .002  .681 to .761, .638 (gamma from sigma(W))
  sigma             lr 0.02, share .002  .600 to .695, .519
  sigma             lr 0.02, share .002  .612 to .666, .503 (gamma from sigma(W))
  sigma             lr 0.02, share .006  .612 to .455, .352 (gamma from sigma(W))

Random features are worth something, too, those of a pre-LN encoder most. So a run counts as trained if its probe lies
above the best random encoder of any arm (median of the runs), by at least half of what the best run of all does.

Prints for each arm the share of runs that trained, and test accuracies at its best learning rate: median
(lowest-highest) of the seeds. Writes results/contrast.json with every run, and a picture.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grids
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import measure

from trimtab.report.runlog import read_run
from trimtab.tasks.contrast import ContrastRecipe
from trimtab.tasks.contrast.recipes import SIGMA, simclr_fashion
from trimtab.train.compare import compare
from trimtab.train.compare.grid import RunPlace
from trimtab.train.hardware import Hardware

LRS = (0.005, 0.02, 0.06, 0.2, 0.6)


def arms(quick: bool) -> dict[str, ContrastRecipe]:
    steps = 10 if quick else 400
    preln = replace(
        simclr_fashion(),
        batch_size=64,
        steps=steps,
        warmup_steps=steps // 10,
        watch_every=steps // 10,
        eval_every=steps,
        checkpoint_every=steps,
        keep=1,
        probe_images=500 if quick else 5000,
        validation=500 if quick else 5000,
    )
    no_norm = replace(preln, model=replace(preln.model, norm="none"))
    return {
        "pre-LN": preln,
        "frozen patches": replace(preln, freeze_patches=True),
        "sigma": replace(no_norm, stabilizer=SIGMA, warmup_steps=0),
        "sigma, pre-LN": replace(preln, stabilizer=SIGMA, warmup_steps=0),
        "init-scale": replace(preln, stabilizer="init-scale:gamma_init=one"),
        "plain": no_norm,
    }


def main() -> None:
    arguments = grids.options(__doc__, seeds=3).parse_args()
    name, folder = grids.place("contrast", arguments)
    chosen, lrs = arms(arguments.quick), LRS[1:2] if arguments.quick else LRS
    seeds = range(1 if arguments.quick else arguments.seeds)
    places = compare(
        chosen,
        lrs,
        seeds,
        folder,
        jobs=arguments.jobs,
        on_news=grids.teller(len(chosen) * len(lrs) * len(seeds)),
        hardware=Hardware(accelerator="cpu"),
        facts={"recipe_name": "simclr-fashion"},
    )
    runs = [row(place) for place in places]
    start, best = mark_trained(runs, list(chosen))
    table = {arm: summary([run for run in runs if run["arm"] == arm], lrs) for arm in chosen}
    show(table, start)
    results = {
        "settings": {"lr": lrs, "seeds": list(seeds)},
        "arms": {arm: {"stabilizer": each.stabilizer, "norm": each.model.norm} for arm, each in chosen.items()},
        "random_encoder_probe_accuracy": start,
        "best_probe_accuracy": best,
        "table": table,
        "runs": runs,
    }
    path = measure.write(name, results)
    draw(runs, list(chosen), lrs, start, path.with_suffix(".png"))
    print(f"\nwritten to {path} and {path.with_suffix('.png').name}")


def row(place: RunPlace) -> dict[str, Any]:
    """How a run ended, what its features are worth, and the lowest entropy of any head."""
    run = read_run(place.folder)
    result: dict[str, Any] = run.result or {"status": "error", "metrics": {}, "initial": {}, "test": {}}
    held_out, initial, test = result["metrics"], result["initial"], result["test"]
    return {
        "arm": place.arm,
        "lr": place.recipe.lr,
        "seed": place.recipe.seed,
        "status": result["status"],
        "initial_probe_accuracy": initial.get("probe_accuracy"),
        "probe_accuracy": held_out.get("probe_accuracy", 0.0),  # what has broken knows nothing
        "knn_accuracy": held_out.get("knn_accuracy", 0.0),
        "test_probe_accuracy": test.get("probe_accuracy", 0.0),
        "test_knn_accuracy": test.get("knn_accuracy", 0.0),
        "entropy_min": min((value for value in run.column("entropy_min") if value == value), default=None),
        "step_seconds": result.get("step_seconds"),
    }


def mark_trained(runs: list[dict[str, Any]], arms: Sequence[str]) -> tuple[float, float]:
    """Note of each run whether it trained; return the probe's accuracy of the best random encoder and the best run."""
    starts = {arm: [run["initial_probe_accuracy"] for run in runs if run["arm"] == arm] for arm in arms}
    known = [[value for value in values if value is not None] for values in starts.values()]
    start = max((statistics.median(values) for values in known if values), default=0.0)
    best = max(run["probe_accuracy"] for run in runs)
    for run in runs:
        run["trained"] = run["probe_accuracy"] > start and run["probe_accuracy"] >= (start + best) / 2
    return start, best


def summary(runs: Sequence[dict[str, Any]], lrs: Sequence[float]) -> dict[str, Any]:
    """Of one arm: the share of runs that trained, its best learning rate, and what that is worth on the test set."""

    def at(lr: float) -> list[dict[str, Any]]:
        return [run for run in runs if run["lr"] == lr]

    best = max(lrs, key=lambda lr: statistics.median(run["probe_accuracy"] for run in at(lr)))
    entropies = [run["entropy_min"] for run in runs if run["entropy_min"] is not None]
    return {
        "trained": statistics.fmean(run["trained"] for run in runs),
        "trained_by_lr": {lr: statistics.fmean(run["trained"] for run in at(lr)) for lr in lrs},
        "best_lr": best,
        "probe_accuracy_by_lr": {lr: statistics.median(run["test_probe_accuracy"] for run in at(lr)) for lr in lrs},
        "probe_accuracy": [run["test_probe_accuracy"] for run in at(best)],
        "knn_accuracy": [run["test_knn_accuracy"] for run in at(best)],
        "entropy_min": min(entropies, default=None),
    }


def show(table: dict[str, dict[str, Any]], start: float) -> None:
    print(f"\nthe best random encoder's probe: {start:.3f}")
    print(f"{'':16}{'trained':>9}{'best lr':>9}{'probe, test':>23}{'neighbours, test':>23}{'lowest entropy':>16}")
    for arm, each in table.items():
        entropy = "-" if each["entropy_min"] is None else f"{each['entropy_min']:.3f}"
        print(
            f"{arm:16}{each['trained']:>9.0%}{each['best_lr']:>9g}{measure.spread(each['probe_accuracy']):>23}"
            f"{measure.spread(each['knn_accuracy']):>23}{entropy:>16}"
        )
    print("\nprobe, test, median of the seeds by learning rate:")
    for arm, each in table.items():
        print(f"{arm:16}" + "".join(f"{lr:>9g}: {value:.3f}" for lr, value in each["probe_accuracy_by_lr"].items()))


def draw(runs: list[dict[str, Any]], names: Sequence[str], lrs: Sequence[float], start: float, path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    colours = dict(zip(names, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for arm in names:
        cells = [[run for run in runs if run["arm"] == arm and run["lr"] == lr] for lr in lrs]
        style = {"color": colours[arm], "marker": "o", "markersize": 3, "linewidth": 1.2}
        panels[0].plot(lrs, [statistics.fmean(run["trained"] for run in cell) for cell in cells], label=arm, **style)
        accuracies = [[run["probe_accuracy"] for run in cell] for cell in cells]
        panels[1].plot(lrs, [statistics.median(each) for each in accuracies], **style)
        panels[1].fill_between(
            lrs, [min(each) for each in accuracies], [max(each) for each in accuracies], color=colours[arm], alpha=0.15
        )
        entropy = [[run["entropy_min"] for run in cell if run["entropy_min"] is not None] for cell in cells]
        panels[2].plot(lrs, [statistics.median(each) if each else float("nan") for each in entropy], **style)
    panels[1].axhline(start, color="grey", linestyle=":", linewidth=1)
    panels[1].annotate("best random encoder", (lrs[0], start - 0.005), fontsize=7, color="grey", va="top")
    panels[1].set_ylim(bottom=start - 0.2)  # what has broken lies below
    titles = ("share of runs that trained", "accuracy of the linear probe, held out", "lowest entropy of a head (0-1)")
    for panel, title in zip(panels, titles, strict=True):
        panel.set(xscale="log", xlabel="learning rate")
        panel.set_title(title, fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(-0.03, 1.03)
    panels[2].set_ylim(-0.03, 1.03)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
