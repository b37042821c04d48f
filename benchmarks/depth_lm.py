"""Language models of 12 to 96 layers and one size: does low-rank attention hold them, and what grows with depth?

    python benchmarks/depth_lm.py                # 140 runs, about 2½ hours on 2 idle cores; killed, it goes on
    python benchmarks/depth_lm.py --seeds 1      # the smallest useful table, about 80 minutes
    python benchmarks/depth_lm.py --gpu          # larger models, longer texts and runs: results/depth_lm_gpu
    python benchmarks/depth_lm.py --quick        # 4 and 8 layers, one learning rate, one seed, 10 steps: does it run?

GPTs on byte pairs of WikiText-2 (1,024 tokens, context 64), as deep as they are narrow: 12 layers of 96 features, 24 of
68, 48 of 48, 96 of 34, 1.4 million parameters each, two heads, pre-LN. 300 steps of 16 windows, AdamW, constant
learning rate after a warmup of 30 steps, no clipping, which would hide what gradients do. GPT-2's start, its standard
deviation of 0.02 at 768 features times sqrt(768 / width), so that a layer's output is as large as there; residual
branches shrunk by (2 · depth)^-½. With --gpu: four times as wide, 22 million
parameters each, heads of 64 to 68 features, 4,096 tokens, context 256, 1,000 steps of 32 windows. The arms:

  vanilla        that model
  sigma          sigma-Reparam with gamma 1 on every layer; LayerNorm stays
  sigma, kept    the same with gamma sigma(W), so that it starts as vanilla does
  MLRA           query, key and value of half rank (Chung et al., arXiv 2409.07787): as many parameters, fresh factors
                 whose products have the variance of the weights they replace
  MLRA, sigma    both, a sigma for each factor; and kept, as above
  init-scale     the control of sigma: weights that merely start at W / sigma(W)

Every arm of every depth has the same three learning rates with the first seed; the one with the lowest loss on the
held-out text then has the other seeds. Per depth and arm, there: perplexity a token, TEV of the token embedding at the
end (mu and sigma over the vocabulary), the largest gradient norm; and of all its runs the share that diverged or ended
no better than they began. By layer:

  output variance    mean square of the residual stream after each block (its mean is near zero), at the first step and
                     at the last. Its growth a layer, in %, over the first and over the second half of the layers:
                     exponential growth is as fast in both, growth by equal steps is slower in the second
  gradient variance  over the entries of a block's gradients: that of the shallowest quarter of the blocks over that of
                     the deepest, median over the steps; and at the logged step at which the run's gradient was
                     largest, the share of runs in which the block that grew most over its own median lies in the
                     shallowest quarter (a quarter, if depth played no part)

Then, for each depth, whether the growth is exponential (in the second half at least three quarters as fast as in the
first), and which arms have a perplexity below or above vanilla's with all seeds. Writes results/depth_lm.json with
every run, and a picture.
"""

import itertools
import math
import statistics
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grids
import measure
import numpy as np
from depth_lm_picture import draw

from trimtab.models.gpt import GPTConfig
from trimtab.report.runlog import Floats, Run, number, read_run
from trimtab.tasks.language import LanguageRecipe
from trimtab.tasks.task import Task
from trimtab.train.compare.grid import RunPlace, plan
from trimtab.train.compare.running import run_places

EVEN = 0.75  # growth that keeps at least this share of its rate in the second half of the layers is exponential
ONE = " (one seed)"
WIDTHS = {12: 96, 24: 68, 48: 48, 96: 34}
WIDER = 4  # times, with --gpu
LRS = (1e-3, 3e-3, 1e-2)
STABILIZERS = {
    "vanilla": "none",
    "sigma": "sigma:gamma_init=one",
    "sigma, kept": "sigma:gamma_init=spectral",
    "MLRA": "low-rank:start=fresh",
    "MLRA, sigma": "low-rank:start=fresh+sigma:gamma_init=one",
    "MLRA, sigma, kept": "low-rank:start=fresh+sigma:gamma_init=spectral",
    "init-scale": "init-scale:gamma_init=one",
}


@dataclass(frozen=True, kw_only=True)
class HeldOut(LanguageRecipe):
    """Without the test text, whose 245,569 words would take longer than the training; the held-out text decides."""

    def task(self) -> Task:
        return replace(super().task(), test=None)


def recipe(depth: int, width: int, *, gpu: bool = False, quick: bool) -> HeldOut:
    """The vanilla model of one depth."""
    steps, every = (1000, 5) if gpu else (300, 5)
    if quick:
        steps, every = (2, 1) if gpu else (10, 2)  # --quick is for a CPU
    std = 0.02 * math.sqrt(768 / width)
    model = GPTConfig(
        4096 if gpu else 1024,
        context=256 if gpu else 64,
        dim=width,
        depth=depth,
        num_heads=width // 64 if gpu else 2,
        init_std=std,
        embedding_std=std,
        position_std=std / 2,
        residual_gain=(2 * depth) ** -0.5,
    )
    return HeldOut(
        data="wikitext-2",
        tokens="bpe",
        model=model,
        batch_size=32 if gpu else 16,
        accumulate=2,  # two halves of a batch tell how much gradients differ
        steps=steps,
        warmup_steps=steps // 10,
        watch_every=every,
        eval_every=steps,
        checkpoint_every=steps,
        keep=1,
        evaluation_tokens=2_000 if quick else 100_000 if gpu else 20_000,
    )


def main() -> None:
    arguments = grids.options(__doc__, seeds=3, gpu=True).parse_args()
    name, folder = grids.place("depth_lm", arguments)
    widths = {4: 24, 8: 16} if arguments.quick else WIDTHS
    widths = {depth: width * (WIDER if arguments.gpu else 1) for depth, width in widths.items()}
    lrs = LRS[:1] if arguments.quick else LRS
    seeds = range(1 if arguments.quick else arguments.seeds)
    arms = recipes(widths, STABILIZERS, arguments)
    places = tuned(arms, lrs, seeds, folder, arguments)
    runs = [row(place) for place in places]
    table = {
        f"{depth}": {
            arm: summary([r for r in runs if (r["depth"], r["arm"]) == (depth, arm)], seeds[0]) for arm in STABILIZERS
        }
        for depth in widths
    }
    show(table)
    print("\n" + "\n".join(verdict(table)))
    results = {
        "settings": {"widths": widths, "lr": lrs, "seeds": list(seeds), "arms": STABILIZERS},
        "table": table,
        "runs": runs,
    }
    path = measure.write(name, results)
    print(f"\nwritten to {path} and {draw(runs, table, list(widths), name).name}")


def tuned(
    arms: Mapping[str, HeldOut], lrs: Sequence[float], seeds: Sequence[int], folder: Path, options: Namespace
) -> list[RunPlace]:
    """Train all learning rates with the first seed, then each arm's best with the others, seed by seed."""
    places = plan(arms, lrs, seeds[:1], folder)
    train_all(places, options)
    best = {name: best_lr([row(place) for place in places if place.arm == name]) for name in arms}
    more = [plan({name: arm}, [best[name]], [seed], folder) for seed in seeds[1:] for name, arm in arms.items()]
    train_all(list(itertools.chain(*more)), options)
    return [*places, *itertools.chain(*more)]


def recipes(widths: Mapping[int, int], arms: Iterable[str], options: Namespace) -> dict[str, HeldOut]:
    """By the names of runs, which tev.py shares: each depth with each of these arms."""
    return {
        f"{depth} layers, {arm}": replace(
            recipe(depth, width, gpu=options.gpu, quick=options.quick), stabilizer=STABILIZERS[arm]
        )
        for depth, width in widths.items()
        for arm in arms
    }


def train_all(places: Sequence[RunPlace], options: Namespace) -> None:
    run_places(
        places,
        jobs=options.jobs,
        on_news=grids.teller(len(places)),
        hardware=grids.hardware(options),
        facts={"recipe_name": "gpt-wikitext2-bpe"},
    )


def row(place: RunPlace) -> dict[str, Any]:
    """How a run ended, and what grew in it."""
    run = read_run(place.folder)
    result: dict[str, Any] = run.result or {"status": "error", "metrics": {}, "initial": {}}
    depth, arm = place.arm.split(" layers, ")
    first, last = (run.lines[i].get("activation_rms", {}) for i in (0, -1))
    tev = next(iter(run.lines[-1].get("tev", {}).values()), [math.nan, math.nan])
    loss, initial = (number(result[when].get("eval_loss")) for when in ("metrics", "initial"))
    by_layer = gradient_variance(run)
    return {
        "arm": arm,
        "depth": int(depth),
        "lr": place.recipe.lr,
        "seed": place.recipe.seed,
        "status": result["status"],
        "failed": result["status"] != "finished" or not loss < initial,  # also where it is NaN
        "eval_loss": loss,
        "perplexity": number(result["metrics"].get("perplexity")),
        "tev": [float(value) for value in tev],
        "grad_norm_max": float(np.nanmax(run.column("grad_norm"), initial=0)),
        "output_variance": [[float(rms) ** 2 for rms in each.values()] for each in (first, last)],
        "shallow_over_deep": shallow_over_deep(by_layer),
        "shallow_grows_most": shallow_grows_most(by_layer, run.column("grad_norm")),
        "grad_variance": np.nanmedian(by_layer, axis=0).tolist(),
        "step_seconds": result.get("step_seconds"),
    }


def gradient_variance(run: Run) -> Floats:
    """Of every block at every logged step, (lines, blocks); NaN where it is not finite."""
    names = [name for name in run.lines[0].get("grad_variance", {}) if name.startswith("blocks.")]
    values = [[float(line.get("grad_variance", {}).get(name, math.nan)) for name in names] for line in run.lines]
    found = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(found) & (found > 0), found, np.nan)


def shallow_over_deep(by_layer: Floats) -> float:
    """Gradient variance of the shallowest quarter of the blocks over that of the deepest; median over the steps."""
    quarter = max(1, by_layer.shape[1] // 4)
    logs = np.log(by_layer)
    return float(np.exp(np.nanmedian(logs[:, :quarter].mean(1) - logs[:, -quarter:].mean(1))))


def shallow_grows_most(by_layer: Floats, norms: Floats) -> bool | None:
    """Whether the block that grew most, when the gradient was largest, lies in the shallowest quarter.

    The first fifth of the steps is left out, where gradients are large because nothing has been learned. None where no
    step after it has finite gradients.
    """
    start = len(norms) // 5
    by_layer, norms = by_layer[start:], norms[start:]
    known = np.isfinite(by_layer).all(1) & np.isfinite(norms)
    if not known.any():
        return None
    by_layer, norms = by_layer[known], norms[known]
    growth = by_layer[np.argmax(norms)] / np.median(by_layer, axis=0)
    return bool(np.argmax(growth) < max(1, len(growth) // 4))


def growth(variance: Sequence[float]) -> list[float]:
    """Growth a layer, as a share, over the first and over the second half of the layers; [] of what is not known."""
    logs = np.log(np.array(variance)) if len(variance) > 2 else np.array([np.nan])
    if not np.isfinite(logs).all():
        return []
    middle = len(logs) // 2
    slopes = ((logs[middle] - logs[0]) / middle, (logs[-1] - logs[middle]) / (len(logs) - 1 - middle))
    return [math.expm1(slope) for slope in slopes]


def best_lr(runs: Sequence[dict[str, Any]]) -> float:
    """That of the run with the lowest loss."""
    return float(min(runs, key=lambda run: math.inf if run["failed"] else run["eval_loss"])["lr"])


def summary(runs: Sequence[dict[str, Any]], tuning_seed: int) -> dict[str, Any]:
    """Of one depth and arm: its best learning rate, and what it did there."""
    tuning = [run for run in runs if run["seed"] == tuning_seed]
    best = best_lr(tuning)
    there = [run for run in runs if run["lr"] == best and not run["failed"]]
    halves = [[growth(run["output_variance"][end]) for run in there] for end in (0, 1)]
    return {
        "best_lr": best,
        "perplexity": [run["perplexity"] for run in there],
        "perplexity_by_lr": {run["lr"]: run["perplexity"] for run in tuning if not run["failed"]},
        "failed": statistics.fmean(run["failed"] for run in runs),
        "tev": [_median([run["tev"][i] for run in there]) for i in (0, 1)],
        "grad_norm_max": _median([run["grad_norm_max"] for run in there]),
        "growth_start": [_median([each[i] for each in halves[0] if each]) for i in (0, 1)],
        "growth_end": [_median([each[i] for each in halves[1] if each]) for i in (0, 1)],
        "output_variance_end": _median([run["output_variance"][1][-1] for run in there if run["output_variance"][1]]),
        "shallow_over_deep": _median([run["shallow_over_deep"] for run in there]),
        "shallow_grows_most": _share([run["shallow_grows_most"] for run in runs]),
    }


def _share(answers: Sequence[bool | None]) -> float:
    known = [answer for answer in answers if answer is not None]
    return statistics.fmean(known) if known else math.nan


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def show(table: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'':24}{'best lr':>8}{'perplexity':>28}{'failed':>7}{'mu TEV':>8}{'sigma':>7}{'max grad':>9}", end="")
    print(f"{'growth, start':>17}{'growth, end':>17}{'shallow/deep':>13}{'shallow first':>14}")
    for depth, arms in table.items():
        for arm, each in arms.items():
            perplexity = measure.spread(each["perplexity"]) if each["perplexity"] else "-"
            start, end = ("/".join(f"{value:.1%}" for value in each[name]) for name in ("growth_start", "growth_end"))
            print(
                f"{depth + ' layers, ' + arm:24}{each['best_lr']:>8g}{perplexity:>28}{each['failed']:>7.0%}"
                f"{each['tev'][0]:>8.3f}{each['tev'][1]:>7.3f}{each['grad_norm_max']:>9.2f}{start:>17}{end:>17}"
                f"{each['shallow_over_deep']:>13.2f}{each['shallow_grows_most']:>14.0%}"
            )


def verdict(table: dict[str, dict[str, Any]]) -> list[str]:
    """For each depth: whether vanilla's variance grows exponentially, and which arms have a lower perplexity."""
    lines = []
    for depth, arms in table.items():
        vanilla = arms["vanilla"]
        told = []
        for when in ("start", "end"):
            first, second = vanilla[f"growth_{when}"]
            if math.isfinite(first) and math.isfinite(second):
                kind = "exponential" if first > 0 and second > EVEN * first else "not exponential"
                told.append(f"{kind} at the {when} ({first:.1%} a layer, then {second:.1%})")
        if told:
            lines.append(f"{depth} layers, vanilla's output variance: {', '.join(told)}")
        for arm, each in arms.items():
            if arm != "vanilla" and each["perplexity"] and vanilla["perplexity"]:
                lower = max(each["perplexity"]) < min(vanilla["perplexity"])
                higher = min(each["perplexity"]) > max(vanilla["perplexity"])
                how = "below" if lower else "above" if higher else "not told apart from"
                lines.append(
                    f"{depth} layers, {arm}: perplexity {how} vanilla's{ONE if len(each['perplexity']) < 2 else ''}"
                )
    return lines


if __name__ == "__main__":
    main()
