"""Speech recognition over learning rates and seeds: tuned post-LN and pre-LN against sigma-Reparam without warmup.

    python benchmarks/speech.py                # 135 runs of digits, about 55 minutes on 2 cores; killed, it goes on
    python benchmarks/speech.py --seeds 1      # the smallest useful table, 17 minutes
    python benchmarks/speech.py --data an4     # the same on AN4, about as long
    python benchmarks/speech.py --depth 12     # deeper
    python benchmarks/speech.py --steps 1800 --arms post-LN pre-LN sigma init-scale    # longer: a table of its own
    python benchmarks/speech.py --gpu          # a larger encoder, longer runs: results/speech_digits_gpu
    python benchmarks/speech.py --quick        # every arm, one learning rate, one seed, 8 steps: does it run?

A small `SpeechEncoder` learns by CTC, on strings of spoken digits (log-mel features of audio) or on CMU AN4 (cepstra).
The arms differ in nothing but:

  post-LN                    LayerNorm after each residual sum, Adam, warmup over a tenth of the steps
  pre-LN                     LayerNorm before each half of a block, Adam, warmup
  post-LN, no warmup         what the warmup is worth to it
  sigma                      sigma-Reparam with gamma 1, no LayerNorm, Adam, no warmup
  init-scale                 the control: no LayerNorm, weights that merely start at W / sigma(W), Adam, no warmup
  post-LN, SGD               plain SGD with momentum 0.9, warmup
  pre-LN, SGD                likewise
  sigma, SGD                 likewise, no warmup
  init-scale, SGD            the control, likewise

Gradients are clipped at 1 in all of them. Every arm has as many settings to be tuned over: five learning rates, one
grid for Adam and one for SGD, each with all seeds. The recordings (AN4: the speakers) held out for validation choose
each arm's learning rate by the median word error rate; the test recordings are measured once for every run.

With --gpu the encoder has 12 blocks of 256 features and an MLP of 1,024, 10 million parameters in place of one at most,
and trains for five times as many steps (digits 3,000, AN4 4,500) of twice as many frames (10,000).

Prints for each arm the share of runs that trained (a word error rate on validation below half that of saying the most
frequent transcript each time, or nothing, which costs 1), how many of the five learning rates come within a tenth of
the best arm's word error rate (in points), and the test word and character error rates at its best learning rate:
median (lowest-highest) of the seeds; then what stands of the paper's finding, that tuned post-LN is the best single
number and sigma-Reparam the one that is easier to get. Writes results/speech_<data>.json with every run, and a picture.

Neither set carries a claim about LibriSpeech: they have 10 and 99 different words, minutes of audio and encoders of
less than a million parameters, or ten. For LibriSpeech there are the recipes speech-librispeech100 and -sigma.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grids
import measure
import pictures

from trimtab.report.runlog import read_run
from trimtab.tasks.speech import SpeechRecipe
from trimtab.tasks.speech.recipes import SIGMA, speech_an4, speech_digits
from trimtab.train.compare import compare
from trimtab.train.compare.grid import RunPlace

LRS = {"adam": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "sgd": (0.03, 0.1, 0.3, 1.0, 3.0)}
STEPS = {"digits": 600, "an4": 900}
GPU_STEPS = 5  # times as many
GPU_ENCODER = {"dim": 256, "depth": 12, "num_heads": 4, "mlp_dim": 1024}
GPU_FRAMES = 10_000  # in a batch
NEAR = 0.1  # of the best arm's word error rate, in points


def arms(
    data: str, depth: int | None, steps: int | None = None, *, gpu: bool, quick: bool
) -> dict[str, dict[str, SpeechRecipe]]:
    """The arms of each optimiser."""
    base = speech_digits() if data == "digits" else speech_an4()
    steps = steps or STEPS[data] * (GPU_STEPS if gpu else 1)
    if gpu:
        base = replace(base, model=replace(base.model, **GPU_ENCODER), batch_tokens=GPU_FRAMES)
    if quick:
        steps = 2 if gpu else 8
        depth = depth or (2 if gpu else None)  # on a CPU
    base = replace(
        base,
        model=replace(base.model, depth=depth or base.model.depth),
        steps=steps,
        warmup_steps=max(1, steps // 10),
        watch_every=max(1, steps // 12),
        eval_every=max(1, steps // 12) * 4,
        checkpoint_every=steps,
        keep=1,
        clip=1.0,
        momentum=0.9,
    )
    post, none = (replace(base, model=replace(base.model, norm=norm)) for norm in ("post", "none"))
    sigma = replace(none, stabilizer=SIGMA, warmup_steps=0)
    adam = {
        "post-LN": post,
        "pre-LN": base,
        "post-LN, no warmup": replace(post, warmup_steps=0),
        "sigma": sigma,
        "init-scale": replace(none, stabilizer="init-scale:gamma_init=one", warmup_steps=0),
    }
    sgd = {
        f"{name}, SGD": replace(adam[name], optimizer="sgd") for name in ("post-LN", "pre-LN", "sigma", "init-scale")
    }
    return {"adam": adam, "sgd": sgd}


def main() -> None:
    parser = grids.options(__doc__, seeds=3, gpu=True)
    parser.add_argument("--data", choices=sorted(STEPS), default="digits")
    parser.add_argument("--depth", type=int, help="blocks of the encoder; the recipe's by default")
    parser.add_argument("--steps", type=int, help="of each run; 600, AN4 900, by default")
    parser.add_argument("--arms", nargs="+", help="only these, such as post-LN 'sigma, SGD'")
    arguments = parser.parse_args()
    own = f"speech_{arguments.data}" + (f"_{arguments.depth}_blocks" if arguments.depth else "")
    own += f"_{arguments.steps}_steps" if arguments.steps else ""
    name, folder = grids.place(own, arguments)
    seeds = range(1 if arguments.quick else arguments.seeds)
    chosen = some(
        arms(arguments.data, arguments.depth, arguments.steps, gpu=arguments.gpu, quick=arguments.quick),
        arguments.arms,
    )
    grid = {kind: LRS[kind][2:3] if arguments.quick else LRS[kind] for kind in chosen}
    total = sum(len(chosen[kind]) * len(grid[kind]) * len(seeds) for kind in chosen)
    tell = grids.teller(total)
    runs, floor = [], 0.0
    for kind, recipes in chosen.items():
        places = compare(
            recipes,
            grid[kind],
            seeds,
            folder / kind,
            jobs=arguments.jobs,
            on_news=lambda run, news, kind=kind: tell(f"{kind}/{run}", news),
            hardware=grids.hardware(arguments),
            facts={"recipe_name": f"speech-{arguments.data}"},
        )
        runs += [row(place, kind) for place in places]
        floor = floor or trivial(places)
    lowest = min(runs_at_best(runs, arm) for arm in names(chosen))
    table = {arm: summary([run for run in runs if run["arm"] == arm], floor, lowest) for arm in names(chosen)}
    show(table, floor)
    print("\n" + "\n".join(verdict(table)))
    results = {
        "settings": {"data": arguments.data, "lr": grid, "seeds": list(seeds), "steps": places[0].recipe.steps},
        "arms": {
            arm: {
                "optimizer": kind,
                "stabilizer": each.stabilizer,
                "norm": each.model.norm,
                "warmup": each.warmup_steps,
            }
            for kind, recipes in chosen.items()
            for arm, each in recipes.items()
        },
        "trivial_wer": floor,
        "table": table,
        "runs": runs,
    }
    path = measure.write(name, results)
    picture = draw(runs, chosen, grid, floor, name)
    print(f"\nwritten to {path} and {picture.name}")


def some(
    chosen: dict[str, dict[str, SpeechRecipe]], wanted: Sequence[str] | None
) -> dict[str, dict[str, SpeechRecipe]]:
    """Those of the names that are wanted; all, if that is None."""
    if wanted is None:
        return chosen
    if unknown := set(wanted) - set(names(chosen)):
        raise SystemExit(f"there is no arm {'; '.join(sorted(unknown))}; there are: {'; '.join(names(chosen))}")
    kept = {kind: {arm: each for arm, each in recipes.items() if arm in wanted} for kind, recipes in chosen.items()}
    return {kind: recipes for kind, recipes in kept.items() if recipes}


def names(chosen: dict[str, dict[str, SpeechRecipe]]) -> list[str]:
    return [arm for recipes in chosen.values() for arm in recipes]


def row(place: RunPlace, kind: str) -> dict[str, Any]:
    """How a run ended, its error rates, and the lowest entropy of any head."""
    run = read_run(place.folder)
    result: dict[str, Any] = run.result or {"status": "error", "metrics": {}, "test": {}}
    held_out, test = result["metrics"], result["test"]
    return {
        "arm": place.arm,
        "optimizer": kind,
        "lr": place.recipe.lr,
        "seed": place.recipe.seed,
        "status": result["status"],
        "wer": held_out.get("wer", 1.0),  # what has broken says nothing
        "eval_loss": held_out.get("eval_loss"),
        "test_wer": test.get("wer", 1.0),
        "test_cer": test.get("cer", 1.0),
        "entropy_min": min((value for value in run.column("entropy_min") if value == value), default=None),
        "step_seconds": result.get("step_seconds"),
    }


def trivial(places: Sequence[RunPlace]) -> float:
    """The word error rate on validation of saying the most frequent training transcript each time, or nothing.

    As a run.json tells.
    """
    told = (read_run(place.folder).info.get("most_frequent_transcript_wer") for place in places)
    return next(min(1.0, each["validation"]) for each in told if each)


def runs_at_best(runs: Sequence[dict[str, Any]], arm: str) -> float:
    """The lowest median word error rate of an arm over its learning rates, on validation."""
    return min(medians([run for run in runs if run["arm"] == arm]).values())


def medians(runs: Sequence[dict[str, Any]]) -> dict[float, float]:
    """Of one arm: learning rate to median word error rate on validation."""
    lrs = sorted({run["lr"] for run in runs})
    return {lr: statistics.median(run["wer"] for run in runs if run["lr"] == lr) for lr in lrs}


def summary(runs: Sequence[dict[str, Any]], floor: float, lowest: float) -> dict[str, Any]:
    """Of one arm: how often and where it trains, and what it is worth on the test set at its best learning rate."""
    by_lr = medians(runs)
    best = min(by_lr, key=lambda lr: by_lr[lr])
    entropies = [run["entropy_min"] for run in runs if run["entropy_min"] is not None]
    return {
        "trained": statistics.fmean(run["wer"] < floor / 2 for run in runs),
        "lrs_near_best": sum(value < lowest + NEAR for value in by_lr.values()),
        "validation_wer_by_lr": by_lr,
        "best_lr": best,
        "test_wer": [run["test_wer"] for run in runs if run["lr"] == best],
        "test_cer": [run["test_cer"] for run in runs if run["lr"] == best],
        "entropy_min": min(entropies, default=None),
    }


def show(table: dict[str, dict[str, Any]], floor: float) -> None:
    print(f"\nword error rate of saying the most frequent transcript, or nothing: {floor:.3f}")
    print(f"{'':22}{'trained':>8}{'near best':>11}{'best lr':>9}{'WER, test':>23}{'CER, test':>23}{'entropy':>9}")
    for arm, each in table.items():
        entropy = "-" if each["entropy_min"] is None else f"{each['entropy_min']:.3f}"
        print(
            f"{arm:22}{each['trained']:>8.0%}{each['lrs_near_best']:>5} of {len(each['validation_wer_by_lr'])} "
            f"{each['best_lr']:>9g}{measure.spread(each['test_wer']):>23}{measure.spread(each['test_cer']):>23}{entropy:>9}"
        )

    print("\nword error rate on validation by learning rate, median:")
    for arm, each in table.items():
        print(f"{arm:22}" + "".join(f"{lr:>9g} {wer:.2f}" for lr, wer in each["validation_wer_by_lr"].items()))


def verdict(table: dict[str, dict[str, Any]]) -> list[str]:
    """What stands here of the paper's finding: tuned post-LN is the best single number, sigma is easier to get."""
    lines = []
    for arm in ("sigma", "sigma, SGD", "init-scale", "init-scale, SGD"):
        if arm not in table or "post-LN" not in table:
            continue
        each, post = table[arm], table["post-LN"]
        if max(post["test_wer"]) < min(each["test_wer"]):
            single = "post-LN's test WER is lower"
        elif max(each["test_wer"]) < min(post["test_wer"]):
            single = "its test WER is lower"
        else:
            single = "test WERs overlap"
        near, other = each["lrs_near_best"], post["lrs_near_best"]
        ease = "easier to get" if near > other else "harder to get" if near < other else "as easy to get"
        lines.append(
            f"{arm} without warmup against tuned post-LN: {single}; {ease} (near the best at {near} learning rates "
            f"against {other}, {each['trained']:.0%} of runs trained against {post['trained']:.0%})"
        )
    return lines


def draw(
    runs: Sequence[dict[str, Any]],
    chosen: dict[str, dict[str, SpeechRecipe]],
    grid: dict[str, tuple[float, ...]],
    floor: float,
    name: str,
) -> Path:
    """Word error rate against learning rate: Adam's arms at the left, SGD's at the right."""
    titles = {"adam": "Adam", "sgd": "SGD, momentum 0.9"}
    figure, axes = pictures.panels(["word error rate, validation"], [titles[kind] for kind in chosen], 3.6, 2.8)
    colours = {
        "post-LN": "#7a828e", "pre-LN": "#3f6fb5", "post-LN, no warmup": "#7a828e", "sigma": "#c2571a",
        "init-scale": "#5d9c59",
    }  # fmt: skip
    entries = {}
    for ax, (kind, recipes) in zip(axes[0], chosen.items(), strict=True):
        for arm in recipes:
            plain = arm.removesuffix(", SGD")
            cells = [[r["wer"] for r in runs if r["arm"] == arm and r["lr"] == lr] for lr in grid[kind]]
            style = "--" if plain == "post-LN, no warmup" else "-"
            (line,) = ax.plot(
                grid[kind], [statistics.median(cell) for cell in cells], style, color=colours[plain], marker="o",
                markersize=3, linewidth=1.4,
            )  # fmt: skip
            low, high = [min(cell) for cell in cells], [max(cell) for cell in cells]
            ax.fill_between(grid[kind], low, high, color=colours[plain], alpha=0.12, linewidth=0)
            entries.setdefault(plain, line)
        ax.axhline(floor, color="#7a828e", linestyle=":", linewidth=1)
        ax.set(xscale="log", ylim=(0, 1.1))
        ax.set_xticks(grid[kind], [f"{lr:g}" for lr in grid[kind]])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("learning rate", fontsize=8)
    first = min(next(iter(grid.values())))
    axes[0][0].annotate("saying the most frequent transcript, or nothing", (first, floor), fontsize=7, va="bottom")
    pictures.legend(figure, entries)
    return pictures.save(figure, name)


if __name__ == "__main__":
    main()
