"""How sensitive a small GPT is to the learning rate under the stabilizers, at two sizes.

    python benchmarks/language.py                # 560 runs, about 80 minutes on 2 idle cores; killed, it goes on
    python benchmarks/language.py --seeds 1      # the smallest useful table, about 15 minutes
    python benchmarks/language.py --gpu          # larger models, longer texts and runs: results/language_gpu
    python benchmarks/language.py --quick        # every arm, one learning rate, one seed, 10 steps: does it run?

Characters of Tiny Shakespeare; 250 steps of 16 windows of 64 tokens; AdamW (0.9, 0.95) without decay, gradients
clipped at 1, a warmup over a tenth of the steps, then cosine, the same for all arms. Linear layers start by Glorot's
rule, token and position embeddings as N(0, 0.5²); head and embedding are two weights, so that sigma-Reparam has the
head, too. The sizes: 3 layers of 64 features, and 4 of 128. The arms differ in nothing but:

  pre-LN              the baseline
  sigma               sigma-Reparam with gamma 1 on every linear layer, no LayerNorm
  sigma, pre-LN       sigma-Reparam with gamma 1 and LayerNorm
  sigma kept, pre-LN  the same with gamma sigma(W), so that it starts as pre-LN does
  init-scale          the control: no LayerNorm, weights that merely start at W / sigma(W)
  init-scale, pre-LN  the same with LayerNorm
  qk-norm             pre-LN, and LayerNorm on the queries and keys of each head
  softcap             pre-LN, attention logits capped at 50 and final ones at 30

LR sensitivity (Wortsman et al., arXiv 2309.14322) is, for each seed, the mean over the 7 learning rates of min(final
loss, loss at init), minus the same at its best one; then the mean of the seeds. An arm that merely moves the optimum,
or that is as bad everywhere, is no cure, so the best losses stand beside it: the validation text chooses the learning
rate, the test text is measured there. Loss: nats a character.

A run takes about 8 and 24 s of one core (measured as CPU time, on a busy machine). Prints both for each size and arm,
and which arms are steadier than pre-LN with intervals apart, and no worse at their best. Writes results/language.json
with every run, and a picture; the reports lie beside the runs.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grids
import measure
import pictures
from compare_stabilizers import measures

from trimtab.models.gpt import GPTConfig
from trimtab.report.compare_page import ComparePage, write_compare_page
from trimtab.report.measured import BEST_LOSS, LR_SENSITIVITY, best_lr
from trimtab.report.runlog import read_run
from trimtab.tasks.language import LanguageRecipe
from trimtab.train.compare import compare
from trimtab.train.compare.grid import RunPlace
from trimtab.train.folder import ERROR

LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
ARMS = {
    "pre-LN": "none",
    "sigma": "sigma:gamma_init=one:remove_norms=true",
    "sigma, pre-LN": "sigma:gamma_init=one",
    "sigma kept, pre-LN": "sigma:gamma_init=spectral",
    "init-scale": "init-scale:remove_norms=true",
    "init-scale, pre-LN": "init-scale",
    "qk-norm": "qk-norm",
    "softcap": "softcap",
}
COLOURS = dict(
    zip(ARMS, ("#8a8f98", "#c0392b", "#e08a1e", "#f2c230", "#6c3483", "#b39ddb", "#1f77b4", "#2e8b57"), strict=True)
)
SIZES = {"3 × 64": (64, 3, 4), "4 × 128": (128, 4, 4)}  # layers × features; features, layers, heads
SIZES_GPU = {"6 × 256": (256, 6, 4), "12 × 512": (512, 12, 8)}


def recipe(size: tuple[int, int, int], steps: int, context: int, batch_size: int) -> LanguageRecipe:
    dim, depth, num_heads = size
    model = GPTConfig(
        None, context, dim, depth, num_heads, tied=False, init="xavier", embedding_std=0.5, position_std=0.5
    )
    return LanguageRecipe(
        data="tinyshakespeare",
        tokens="characters",
        model=model,
        betas=(0.9, 0.95),
        schedule="cosine",
        warmup_steps=steps // 10,
        clip=1.0,
        batch_size=batch_size,
        steps=steps,
        watch_every=steps // 10,
        eval_every=steps,
        checkpoint_every=steps,
        keep=1,
        evaluation_tokens=None if steps > 250 else 16_384,
    )


def main() -> None:
    arguments = grids.options(__doc__, gpu=True).parse_args()
    name, folder = grids.place("language", arguments)
    sizes, budget = (SIZES_GPU, (2000, 256, 64)) if arguments.gpu else (SIZES, (250, 64, 16))
    recipes = {size: recipe(sizes[size], 10 if arguments.quick else budget[0], *budget[1:]) for size in sizes}
    lrs, seeds = (LRS[3:4], 1) if arguments.quick else (LRS, arguments.seeds)
    total = len(sizes) * len(ARMS) * len(lrs) * seeds
    tell = grids.teller(total)
    places: dict[str, list[RunPlace]] = {}
    for count in range(1, seeds + 1):  # seed by seed, so that what is there after a while is a fair table
        for size, each in recipes.items():
            places[size] = compare(
                {arm: replace(each, stabilizer=spec) for arm, spec in ARMS.items()},
                lrs,
                range(count),
                folder / size.replace(" × ", "x"),
                jobs=arguments.jobs,
                on_news=lambda run, news, size=size: tell(f"{size}, {run}", news),
                hardware=grids.hardware(arguments),
                facts={"recipe_name": "gpt-shakespeare"},
            )
    runs = {size: [row(place) for place in of_size] for size, of_size in places.items()}
    found = {}
    for size in sizes:
        page = write_compare_page([places[size][0].folder.parents[2]], folder / f"{size.replace(' × ', 'x')}.html")
        print(f"\n{size}\n{page.summary}")
        found[size] = {"table": table(page, runs[size]), "measures": measures(page), "runs": runs[size]}
    show({size: each["table"] for size, each in found.items()})
    show_losses(runs, lrs)
    print("\n" + "\n".join(verdict({size: each["table"] for size, each in found.items()})))
    path = measure.write(name, {"settings": {"lr": lrs, "seeds": seeds, "arms": ARMS}, "sizes": found})
    draw({size: each["table"] for size, each in found.items()}, runs, lrs, name)
    print(f"\nwritten to {path}, its picture beside it; the reports: {folder}")


def row(place: RunPlace) -> dict[str, Any]:
    """How a run ended, and the extremes that its heads reached at any logged step."""
    facts = {"arm": place.arm, "lr": place.recipe.lr, "seed": place.recipe.seed}
    if (place.folder / ERROR).exists():
        return facts | json.loads((place.folder / ERROR).read_text(encoding="utf8"))
    run = read_run(place.folder)
    result: dict[str, Any] = run.result
    low, high = run.column("entropy_min"), run.column("max_logit")
    return facts | {
        "status": result["status"],
        "initial_loss": result["initial"]["eval_loss"],
        "loss": result["metrics"].get("eval_loss"),
        "test_loss": result["test"].get("eval_loss"),
        "test_word_perplexity": result["test"].get("word_perplexity"),
        "entropy_min": min((value for value in low if value == value), default=None),
        "max_logit": max((value for value in high if value == value), default=None),
        "step_seconds": result["step_seconds"],
    }


def counted(run: Mapping[str, Any]) -> float | None:
    """min(final loss, loss at init); None for a run that raised."""
    if "initial_loss" not in run:
        return None
    loss = run["loss"] if run["status"] == "finished" else None
    return min(loss if loss is not None and loss == loss else float("inf"), run["initial_loss"])


MEASURED: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "validation loss": counted,
    # a run that diverged stopped before it logged its worst
    "largest attention logit": lambda run: run.get("max_logit") if run.get("status") == "finished" else None,
    "lowest entropy (0-1)": lambda run: run.get("entropy_min") if run.get("status") == "finished" else None,
}


def table(page: ComparePage, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each arm: LR sensitivity and best loss with their intervals, and what the test text says there."""
    comparison, all_measured = page.groups[0]
    by_name = {each.measure.name: each for each in all_measured}
    found = {}
    for arm in comparison.grids:
        lr = best_lr(comparison, arm, BEST_LOSS)
        of_arm = [run for run in runs if run["arm"] == arm]
        test = [run["test_loss"] for run in of_arm if run["lr"] == lr and run.get("test_loss") is not None]
        found[arm] = {
            key: [by_name[measure_.name].values[arm], *by_name[measure_.name].intervals[arm]]
            for key, measure_ in (("lr_sensitivity", LR_SENSITIVITY), ("best_loss", BEST_LOSS))
            if measure_.name in by_name
        } | {
            "best_lr": lr,
            "test_loss": test,
            "failed": statistics.fmean(counted(run) is None or counted(run) == run["initial_loss"] for run in of_arm),
        }
    return found


def show(tables: Mapping[str, Mapping[str, Any]]) -> None:
    print("\nLR sensitivity and best validation loss: mean of the seeds [95 %]; test loss: median (lowest-highest)")
    print(f"{'':29}{'LR sensitivity':>24}{'best loss':>24}{'at lr':>8}{'test loss':>22}{'failed':>8}")
    for size, arms in tables.items():
        for arm, each in arms.items():
            numbers = [
                "-" if value != value else f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low == low else "")
                for value, low, high in (each.get(key, [float("nan")] * 3) for key in ("lr_sensitivity", "best_loss"))
            ]
            test = measure.spread(each["test_loss"]) if each["test_loss"] else "-"
            lr = "-" if each["best_lr"] is None else f"{each['best_lr']:g}"
            print(f"{size:9}{arm:20}{numbers[0]:>24}{numbers[1]:>24}{lr:>8}{test:>22}{each['failed']:>8.0%}")


def show_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]], lrs: Sequence[float]) -> None:
    print("\nvalidation loss, median of the seeds, of failed runs that of the start:")
    print(f"{'':29}" + "".join(f"{lr:>8g}" for lr in lrs))
    for size, (arm, lr) in itertools.product(runs, itertools.product(ARMS, lrs)):
        losses = [counted(each) for each in runs[size] if (each["arm"], each["lr"]) == (arm, lr)]
        known = [loss for loss in losses if loss is not None]
        begin, end = (f"{size:9}{arm:20}" if lr == lrs[0] else ""), ("\n" if lr == lrs[-1] else "")
        print(begin + (f"{statistics.median(known):8.2f}" if known else f"{'-':>8}"), end=end)


def verdict(tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which arms are steadier than pre-LN without being worse at their best; intervals that overlap tell nothing."""
    lines = []
    for size, arms in tables.items():
        base = arms["pre-LN"]
        for arm, each in arms.items():
            if arm == "pre-LN" or not {"lr_sensitivity", "best_loss"} <= each.keys() & base.keys():
                continue
            steady, best = (_against(each[key], base[key]) for key in ("lr_sensitivity", "best_loss"))
            if steady == "lower":
                cure = {
                    "higher": "merely moves the optimum: its best loss is higher",
                    "lower": "and its best loss is lower",
                }
                told = f"steadier than pre-LN, {cure.get(best, 'and its best loss is not told apart')}"
            else:
                told = (
                    "less steady than pre-LN" if steady == "higher" else "not told apart from pre-LN in LR sensitivity"
                )
            lines.append(f"{size}, {arm}: {told}")
    return lines or ["one seed, or one learning rate, tells no arms apart"]


def _against(one: Sequence[float], other: Sequence[float]) -> str:
    """Whether one mean with its interval lies "lower" or "higher" than another; "" where they overlap."""
    if one[2] < other[1]:
        return "lower"
    return "higher" if one[1] > other[2] else ""


def draw(
    tables: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    lrs: Sequence[float],
    name: str,
) -> Path:
    """A column a size: over the learning rates the loss, the largest attention logit and the lowest entropy."""
    figure, axes = pictures.panels(list(MEASURED), list(runs), width=3.4, height=1.9)
    lines = {}
    for (of_size, column), arm in itertools.product(zip(runs.values(), zip(*axes, strict=True), strict=True), ARMS):
        of_arm = [run for run in of_size if run["arm"] == arm]
        for panel, value in zip(column, MEASURED.values(), strict=True):
            cells = {lr: [value(run) for run in of_arm if run["lr"] == lr and value(run) is not None] for lr in lrs}
            known = {lr: cell for lr, cell in cells.items() if cell}
            middle = [statistics.median(cell) for cell in known.values()]
            style = {"color": COLOURS[arm], "marker": "o", "markersize": 2.5, "linewidth": 1.2}
            (lines[arm],) = panel.plot(list(known), middle, **style)
            low, high = [min(cell) for cell in known.values()], [max(cell) for cell in known.values()]
            panel.fill_between(list(known), low, high, color=COLOURS[arm], alpha=0.12, linewidth=0)
    for panel in itertools.chain(*axes):
        panel.set_xscale("log")
    axes[1][0].set_yscale("log")
    axes[1][0].set_ylim(top=min(1e8, axes[1][0].get_ylim()[1]))
    for panel in axes[-1]:
        panel.set_xlabel("learning rate", fontsize=8, color=pictures.INK)
    if all("lr_sensitivity" in each for arms in tables.values() for each in arms.values()):
        lines = {f"{arm} ({_sensitivities(tables, arm)})": line for arm, line in lines.items()}
    pictures.legend(figure, lines)
    return pictures.save(figure, name)


def _sensitivities(tables: Mapping[str, Mapping[str, Any]], arm: str) -> str:
    return ", ".join(f"{arms[arm]['lr_sensitivity'][0]:.2f}" for arms in tables.values())


if __name__ == "__main__":
    main()
