"""The motivating picture: learning rates too high, logits too hot, and what becomes of the attention entropy.

    python benchmarks/entropy_collapse.py              # about an hour on 2 cores; killed, it goes on where it was
    python benchmarks/entropy_collapse.py --seeds 1    # the smallest useful table
    python benchmarks/entropy_collapse.py --quick      # digits, 40 steps, three learning rates: does it run?

A ViT on Fashion-MNIST (patches of 7, 16 tokens, 4 layers, d 64), AdamW at a constant learning rate, without warmup,
decay or clipping, as in the motivating experiment of Zhai et al. (arXiv 2303.06296). Arms:
  pre-LN         the baseline, from Glorot's start
  sigma-Reparam  gamma 1 on every layer, weights N(0, 0.4²), no LayerNorm
  init-scale     the control: as sigma-Reparam, but its weights merely start at W / sigma(W)

First every arm trains at learning rates that double, 5e-4 to 0.256. Its best one has the lowest final test loss (median
of the seeds); the question is what happens at 2, 4, 8 ... times that. An arm "holds up" to the last factor in a row at
which its median final loss is within a tenth of the way from the best one back to the loss at the start.

Then the intervention: at its own best learning rate, all attention logits are multiplied by a factor from the middle
of the run on; and once for 100 steps only.

Writes results/entropy_collapse.json, entropy_collapse.png and entropy_collapse_heat.png.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import entropy_pictures
import grids
import measure
import torch
from torch import Tensor, nn

from trimtab.report.summary import RunSummary, read_summary
from trimtab.tasks.images import ImagesRecipe, vit_digits, vit_fashion
from trimtab.tasks.task import Task
from trimtab.train.compare import compare
from trimtab.train.hardware import Hardware

BASELINE, SIGMA = "pre-LN", "sigma-Reparam"
ARMS = {
    BASELINE: "none",
    SIGMA: "sigma:gamma_init=one:init_std=0.4:remove_norms=true",
    "init-scale": "init-scale:gamma_init=one:init_std=0.4:remove_norms=true",
}
LRS = tuple(5e-4 * 2**k for k in range(10))
HEATS = (2.0, 4.0, 8.0, 16.0)
BRIEF = 100  # steps
TOLERANCE = 0.1  # of the way from the best loss to that at the start, as the LR range of trimtab compare


@dataclass(frozen=True, kw_only=True)
class Heated(ImagesRecipe):
    """The images task, with all attention logits multiplied by `heat` in steps `heat_from` to before `heat_until`."""

    heat: float = 1.0
    heat_from: int = 1
    heat_until: int | None = None

    def task(self) -> Task:
        task = super().task()
        if self.heat != 1:
            for block in task.model.blocks:
                heat_(block.attention.query, self)
        return task


def heat_(query: nn.Module, recipe: Heated) -> None:
    """Multiply what the query projection returns, and with it the logits; in eval mode as in the last step.

    Training forwards are steps here (`accumulate` is 1). They are counted in a buffer, so that a resumed run knows.
    """
    query.register_buffer("forwards", torch.zeros(1, dtype=torch.int64))
    query.register_forward_hook(partial(_heated, recipe))


def _heated(recipe: Heated, query: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if query.training:
        query.forwards += 1
    is_hot = query.forwards >= recipe.heat_from
    if recipe.heat_until is not None:
        is_hot = is_hot & (query.forwards < recipe.heat_until)
    return torch.where(is_hot, recipe.heat * output, output)


def plain(quick: bool) -> Heated:
    """The baseline's recipe, but for its learning rate."""
    if quick:
        return Heated(data="digits", model=vit_digits().model, steps=40, watch_every=4, eval_every=40)
    model = replace(vit_fashion().model, patch_size=7)
    return Heated(data="fashion-mnist", model=model, steps=1000, watch_every=10, eval_every=1000)


def main() -> None:
    arguments = grids.options(__doc__).parse_args()
    name, folder = grids.place("entropy_collapse", arguments)
    lrs = (1e-3, 8e-3, 6.4e-2) if arguments.quick else LRS
    seeds = range(1 if arguments.quick else arguments.seeds)
    recipe = plain(arguments.quick)
    arms = {arm: replace(recipe, stabilizer=stabilizer) for arm, stabilizer in ARMS.items()}

    sweep = trained(arms, lrs, seeds, folder / "sweep", arguments.jobs)
    best = {arm: best_lr(arm, sweep) for arm in arms}
    table(sweep, best)
    heated: dict[str, list[RunSummary]] = {}
    for arm in (BASELINE, SIGMA):
        hot = {name: replace(arms[arm], **heat) for name, heat in heats(recipe.steps, arguments.quick).items()}
        heated[arm] = trained(hot, [best[arm]], seeds, folder / f"heat-{arm}", arguments.jobs)
        print(f"\n{arm} at {best[arm]:g}, logits multiplied from step {recipe.steps // 2} on")
        heat_table(heated[arm])
    results = {
        "arms": ARMS,
        "best_lr": best,
        "holds_up_to": {arm: holds_up_to(arm, sweep, best[arm]) for arm in arms},
        "sweep": [row(run) for run in sweep],
        "heat": {arm: [row(run) | {"jump": jump(run)} for run in runs] for arm, runs in heated.items()},
    }
    tokens = recipe.model.num_patches
    pictures = [
        entropy_pictures.learning_rates(name, sweep, best, first_broken(sweep, best[BASELINE]), tokens),
        entropy_pictures.heats(f"{name}_heat", heated, recipe.steps // 2, tokens),
    ]
    print("written to", measure.write(name, results), *pictures)


def heats(steps: int, quick: bool) -> dict[str, dict[str, Any]]:
    """The interventions by name: fields of the recipe."""
    middle = steps // 2
    brief = {"heat": HEATS[-1], "heat_from": middle + 1, "heat_until": middle + 1 + min(BRIEF, steps // 4)}
    lasting = {f"×{heat:g}": {"heat": heat, "heat_from": middle + 1} for heat in (HEATS[-1:] if quick else HEATS)}
    return lasting | {f"×{HEATS[-1]:g}, then back": brief}


def trained(
    arms: Mapping[str, Heated], lrs: Sequence[float], seeds: Sequence[int], folder: Path, jobs: int | None
) -> list[RunSummary]:
    """Train what is not trained yet, and read the runs."""
    tell = grids.teller(len(arms) * len(lrs) * len(seeds), folder.name)
    places = compare(arms, lrs, seeds, folder, jobs=jobs, on_news=tell, hardware=Hardware(accelerator="cpu"))
    return [read_summary(place.folder) for place in places]


def loss(run: RunSummary) -> float:
    """The final test loss, nats; that at the start for a run that failed."""
    return run.initial_loss if run.failed else run.loss


def at(arm: str, lr: float, runs: Sequence[RunSummary]) -> list[RunSummary]:
    """The seeds of an arm at a learning rate."""
    return [run for run in runs if run.arm == arm and run.lr == lr]


def best_lr(arm: str, runs: Sequence[RunSummary]) -> float:
    lrs = sorted({run.lr for run in runs})
    return min(lrs, key=lambda lr: median(map(loss, at(arm, lr, runs))))


def holds(arm: str, lr: float, runs: Sequence[RunSummary], best: float) -> bool:
    """Whether an arm is still nearly as good as at its best learning rate."""
    lowest = median(map(loss, at(arm, best, runs)))
    start = median(run.initial_loss for run in at(arm, best, runs))
    return median(map(loss, at(arm, lr, runs))) <= lowest + TOLERANCE * (start - lowest)


def holds_up_to(arm: str, runs: Sequence[RunSummary], best: float) -> float:
    """The last factor in a row over the best learning rate at which the arm holds up."""
    factor = 1.0
    for lr in sorted({run.lr for run in runs if run.lr > best}):
        if not holds(arm, lr, runs, best):
            break
        factor = lr / best
    return factor


def first_broken(runs: Sequence[RunSummary], best: float) -> float:
    """The first factor at which the baseline does not hold up; the last one there is if it always does."""
    lrs = sorted({run.lr for run in runs if run.lr > best})
    return next((lr / best for lr in lrs if not holds(BASELINE, lr, runs, best)), lrs[-1] / best if lrs else 1.0)


def row(run: RunSummary) -> dict[str, Any]:
    return {
        "arm": run.arm,
        "lr": run.lr,
        "seed": run.seed,
        "status": run.status,
        "failed": run.failed,
        "accuracy": run.metric,
        "eval_loss": run.loss,
        "initial_loss": run.initial_loss,
        "entropy_min": run.entropy_min,
        "max_logit": run.max_logit,
        "spikes": run.spikes,
        "alarms": len(run.alarms),
    }


def table(runs: Sequence[RunSummary], best: Mapping[str, float]) -> None:
    print("\nmedian of the seeds: test accuracy, final test loss | lowest entropy (0 to 1), largest logit, spikes")
    for arm in best:
        print(f"{arm}: best at {best[arm]:g}, holds up to ×{holds_up_to(arm, runs, best[arm]):g} of that")
        for lr in sorted({run.lr for run in runs}):
            found = at(arm, lr, runs)
            accuracy = median(0.0 if math.isnan(run.metric) else run.metric for run in found)
            numbers = f"{accuracy:.3f} {median(map(loss, found)):6.3f} | {seen(found)}"
            print(f"  {lr:<8g} ×{lr / best[arm]:<8g} {numbers}  {sum(run.failed for run in found)} failed")


def seen(runs: Sequence[RunSummary]) -> str:
    low, high = median(run.entropy_min for run in runs), median(run.max_logit for run in runs)
    return f"{low:.3f} {high:8.0f} {median(run.spikes for run in runs):3g}"


def heat_table(runs: Sequence[RunSummary]) -> None:
    for arm in dict.fromkeys(run.arm for run in runs):
        found = [run for run in runs if run.arm == arm]
        jumps = median(jump(run) for run in found)
        print(f"  {arm:16} jump {jumps:7.2f} nats, final loss {median(map(loss, found)):.3f} | {seen(found)}")


def jump(run: RunSummary) -> float:
    """How far the training loss rises in the tenth of the run after the intervention, over its median before, nats."""
    middle, span = run.recipe["steps"] // 2, run.recipe["steps"] // 10
    steps, losses = run.curves["loss"]
    before = losses[(steps > middle - span) & (steps <= middle)]
    after = losses[(steps > middle) & (steps <= middle + span)]
    return float(after.max() - median(before)) if len(before) and len(after) else math.nan


if __name__ == "__main__":
    main()
