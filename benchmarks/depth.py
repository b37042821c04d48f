"""Encoder-decoders of 6 + 6 to 100 + 100 blocks without warmup: which train, and how much is the start of weights.

    python benchmarks/depth.py --depths 6,18     # the smallest useful table
    python benchmarks/depth.py                   # 6, 18, 50 and 100 blocks in encoder and decoder each
    python benchmarks/depth.py --optimizer sgd --depths 6,18     # no adaptive optimiser: a table of its own
    python benchmarks/depth.py --optimizer lars --depths 6,18    # likewise, by LARS
    python benchmarks/depth.py --steps 1200 --depths 18          # other lengths are tables of their own, too
    python benchmarks/depth.py --depths 50 --lrs 0.0001          # learning rates to be added to a table
    python benchmarks/depth.py --depths 6 --seeds 3              # seeds to be added to a depth
    python benchmarks/depth.py --gpu             # wider, longer, more byte pairs: results/depth_gpu
    python benchmarks/depth.py --quick           # every arm, one learning rate, one seed, 4 steps: does it run?

On two idle cores a seed takes about 2½, 6 and 17 minutes at 6, 18 and 50 blocks, longer at 100; with LARS 5 and 10 at 6
and 18. depth_bleu.py takes the arms of a depth to a BLEU.

English to German on Multi30k, narrow (32 features, 2 heads, 2,000 byte pairs): 300 steps (SGD: 1,500; LARS: 600) of at
most 1,024 tokens, constant learning rate, no warmup, no dropout. With --gpu: 256 features, 4 heads, 8,000 byte
pairs, 1,000 steps (SGD: 3,000; LARS: 2,000) of 4,096 tokens, 13 to 186 million parameters, 100 GB of
checkpoints. The arms differ in nothing but:

  post-LN     Vaswani et al.'s, Glorot's start
  pre-LN      the norms before the branches, one after the last block
  DeepNorm    post-LN with the scales of Wang et al., arXiv 2203.00555
  sigma       post-LN, sigma-Reparam with gamma 1 (Zhai et al., arXiv 2303.06296)
  init-scale  the control: post-LN whose weights merely start at W / sigma(W)

All have the same learning rates, each with all seeds. With SGD and LARS (momentum 0.9) gradients are clipped at norm 1;
LARS moves each weight by a tenth of the learning rate times its norm, gammas and biases as SGD does. A run trained if
its loss on the validation set, in nats a token, ends at least 0.1 below that of a model that knows only how often each
token occurs.

Prints for each depth and arm the share of runs that trained, and at its best learning rate the loss, the lowest entropy
of a head over all logged steps (0-1), and how many times larger the gradients of its last encoder block are than those
of its first (standard deviation of the entries, first step). Then for each depth the learning rates at which sigma
trains and post-LN does not, and at which of these the control does not, either. Killed, it goes on. Writes
results/depth.json, depth_sgd.json or depth_lars.json, which has entropy and gradients by layer, and a picture.
"""

import math
import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import grids
import measure
import numpy as np
from depth_picture import draw

from trimtab.models.encoder_decoder import EncoderDecoderConfig
from trimtab.report.runlog import read_run
from trimtab.tasks.text.tokens import END
from trimtab.tasks.translation import TranslationRecipe
from trimtab.tasks.translation.pairs import find_corpus
from trimtab.tasks.translation.sentences import Sentences, load_encoded
from trimtab.train.compare import compare
from trimtab.train.compare.grid import RunPlace

LRS = {
    "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "sgd": (0.1, 0.3, 1.0, 3.0),
    "lars": (0.003, 0.01, 0.03, 0.1, 0.3),  # of gammas and biases; the weights move by a tenth of it of their norm
}
STEPS = {"adam": 300, "sgd": 1500, "lars": 600}
STEPS_GPU = {"adam": 1000, "sgd": 3000, "lars": 2000}
FACTS = {"recipe_name": "translate-multi30k"}
MARGIN = 0.1  # nats a token below the unigram model's loss


class Size(NamedTuple):
    """What does not depend on depth; tokens are those of a step."""

    dim: int
    num_heads: int
    vocabulary: int
    tokens: int


SIZE = Size(32, 2, 2000, 1024)
SIZE_GPU = Size(256, 4, 8000, 4096)


def arms(depth: int, optimizer: str, steps: int, size: Size = SIZE) -> dict[str, TranslationRecipe]:
    post = TranslationRecipe(
        data="multi30k",
        source="en",
        target="de",
        model=EncoderDecoderConfig(
            source_vocab=size.vocabulary,
            target_vocab=size.vocabulary,
            dim=size.dim,
            encoder_depth=depth,
            decoder_depth=depth,
            num_heads=size.num_heads,
            dropout=0.0,
        ),
        max_length=50,
        decode="never",
        optimizer=optimizer,  # type: ignore[arg-type]
        clip=None if optimizer == "adam" else 1.0,
        trust_coefficient=0.1 if optimizer == "lars" else 1e-3,
        betas=(0.9, 0.98),
        steps=steps,
        batch_tokens=size.tokens,
        watch_every=max(1, steps // 10),
        eval_every=steps,
        checkpoint_every=max(1, steps // 3),
        keep=1,
    )
    return {
        "post-LN": post,
        "pre-LN": replace(post, model=replace(post.model, norm="pre")),
        "DeepNorm": replace(post, stabilizer="deepnorm"),
        "sigma": replace(post, stabilizer="sigma:gamma_init=one"),
        "init-scale": replace(post, stabilizer="init-scale:gamma_init=one"),
    }


def main() -> None:
    parser = grids.options(__doc__, seeds=1, gpu=True)
    parser.add_argument("--depths", default="6,18,50,100", help="blocks of the encoder, and of the decoder")
    parser.add_argument("--optimizer", choices=LRS, default="adam")
    parser.add_argument("--lrs", help="learning rates, in place of the five or four of the optimiser")
    parser.add_argument("--steps", type=int, help="those said above by default")
    arguments = parser.parse_args()
    optimizer, size = arguments.optimizer, SIZE_GPU if arguments.gpu else SIZE
    usual = (STEPS_GPU if arguments.gpu else STEPS)[optimizer]
    steps = arguments.steps or usual
    if arguments.quick:
        steps = 2 if arguments.gpu else 4  # on a CPU
    own = f"_{steps}_steps" if arguments.steps and steps != usual else ""
    name, folder = grids.place("depth" + f"_{optimizer}" * (optimizer != "adam") + own, arguments)
    depths = (2, 3) if arguments.quick else tuple(map(int, arguments.depths.split(",")))
    seeds = range(1 if arguments.quick else arguments.seeds)
    unigram = unigram_loss(size.vocabulary)
    facts = {"steps": steps, "unigram_loss": unigram}
    lrs = tuple(map(float, arguments.lrs.split(","))) if arguments.lrs else LRS[optimizer]
    lrs = lrs[1:2] if arguments.quick else lrs
    for depth in sorted(depths):
        chosen = arms(depth, optimizer, steps, size)
        places = grid(chosen, lrs, seeds, folder / str(depth), arguments)
        runs = [row(place, unigram) for place in places]
        runs = sorted([*other_runs(name, facts, runs), *runs], key=lambda run: run["depth"])
        results = facts | {"table": table_of(runs), "runs": runs}
        path = measure.write(name, results)
        draw(results, name)
        show(results["table"], unigram)
        print("\n".join(verdict(results["table"])))
        print(f"written to {path} and {path.with_suffix('.png').name}\n", flush=True)


def other_runs(name: str, facts: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What earlier calls with as many steps have left of other depths, learning rates and seeds."""
    before = measure.read(name)
    if any(before.get(key) != value for key, value in facts.items()):
        return []
    now = {(run["depth"], run["lr"], run["seed"]) for run in runs}
    return [run for run in before["runs"] if (run["depth"], run["lr"], run["seed"]) not in now]


def table_of(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each depth and arm."""
    cells = dict.fromkeys((run["depth"], run["arm"]) for run in runs)
    return [summary([run for run in runs if (run["depth"], run["arm"]) == cell]) for cell in cells]


def grid(
    chosen: dict[str, TranslationRecipe], lrs: Sequence[float], seeds: Sequence[int], folder: Path, options: Namespace
) -> list[RunPlace]:
    return compare(
        chosen,
        lrs,
        seeds,
        folder,
        jobs=options.jobs,
        on_news=grids.teller(len(chosen) * len(lrs) * len(seeds), folder.name),
        hardware=grids.hardware(options),
        facts=FACTS,
    )


def unigram_loss(vocabulary: int) -> float:
    """Nats a token on the validation set, ends included, of the frequencies in training, one added to each count."""
    corpus = find_corpus("multi30k", "en", "de")
    encoded = load_encoded(corpus, vocabulary, vocabulary, joint=True)

    def counts(sentences: Sentences) -> np.ndarray[Any, Any]:
        found = np.bincount(sentences.tokens, minlength=vocabulary).astype(np.float64)
        found[END] += len(sentences.lengths)
        return found

    known = counts(encoded.target["train"]) + 1
    seen = counts(encoded.target["valid"])
    return float(-(seen * np.log(known / known.sum())).sum() / seen.sum())


def row(place: RunPlace, unigram: float) -> dict[str, Any]:
    """How a run ended, and its entropies and gradients by layer."""
    run = read_run(place.folder)
    result = run.result or {"status": "error", "initial": {}}
    loss = loss_of(place)
    least = np.nanmin(run.entropy_normalized, initial=np.inf)
    return {
        "arm": place.arm,
        "depth": place.recipe.model.encoder_depth,  # type: ignore[attr-defined]
        "optimizer": place.recipe.optimizer,
        "lr": place.recipe.lr,
        "seed": place.recipe.seed,
        "status": result["status"],
        "initial_loss": result["initial"].get("eval_loss"),
        "loss": loss,
        "trained": loss < unigram - MARGIN,
        "entropy_min": float(least) if math.isfinite(least) else None,
        "entropy_by_layer": by_layer(run.heads, run.entropy_normalized[-1]),
        "gradient_by_layer": {"first": gradients(run.lines[0]), "last": gradients(run.lines[-1])},
        "step_seconds": result.get("step_seconds"),
    }


def by_layer(heads: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """The lowest of each attention layer's heads; of what has broken, nothing."""
    found: dict[str, float] = {}
    for head, value in zip(heads, values, strict=True):
        layer = head.rpartition(" head ")[0]
        if math.isfinite(value):
            found[layer] = min(float(value), found.get(layer, math.inf))
    return found


def gradients(line: dict[str, Any]) -> dict[str, float]:
    """Standard deviation over the entries of each block's gradient."""
    logged = line.get("grad_variance") or {}
    return {name: math.sqrt(float(value)) for name, value in logged.items() if math.isfinite(float(value))}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one depth and arm."""
    lrs = sorted({run["lr"] for run in runs})

    def at(lr: float) -> list[dict[str, Any]]:
        return [run for run in runs if run["lr"] == lr]

    best = min(lrs, key=lambda lr: statistics.median(run["loss"] for run in at(lr)))
    entropies = [run["entropy_min"] for run in at(best) if run["entropy_min"] is not None]
    return {
        "optimizer": runs[0]["optimizer"],
        "depth": runs[0]["depth"],
        "arm": runs[0]["arm"],
        "seeds": sorted({run["seed"] for run in runs}),
        "trained": statistics.fmean(run["trained"] for run in runs),
        "trained_by_lr": {f"{lr:g}": statistics.fmean(run["trained"] for run in at(lr)) for lr in lrs},
        "loss_by_lr": {f"{lr:g}": statistics.median(run["loss"] for run in at(lr)) for lr in lrs},
        "best_lr": best,
        "loss": statistics.median(run["loss"] for run in at(best)),
        "entropy_min": min(entropies, default=None),
        "gradient_last_over_first": statistics.median(last_over_first(run) for run in at(best)),
        "step_seconds": statistics.median(run["step_seconds"] or math.nan for run in runs),
    }


def last_over_first(run: dict[str, Any]) -> float:
    found = run["gradient_by_layer"]["first"]
    first, last = found.get("encoder.0"), found.get(f"encoder.{run['depth'] - 1}")
    return last / first if first and last else math.nan


def show(table: Sequence[dict[str, Any]], unigram: float) -> None:
    print(f"\nloss of the unigram model: {unigram:.2f}")
    print(
        f"{'':28}{'trained':>9}{'best lr':>9}{'loss':>8}{'lowest entropy':>16}{'gradient, last/first':>22}{'s/step':>8}"
    )
    for each in table:
        title = f"{each['optimizer']} {each['depth']}+{each['depth']} {each['arm']} × {len(each['seeds'])}"
        entropy = "-" if each["entropy_min"] is None else f"{each['entropy_min']:.3f}"
        print(
            f"{title:28}{each['trained']:>9.0%}{each['best_lr']:>9g}{each['loss']:>8.2f}{entropy:>16}"
            f"{each['gradient_last_over_first']:>22.2g}{each['step_seconds']:>8.2f}"
        )

    print("\nloss by learning rate, median:")
    for each in table:
        losses = "".join(f"{lr:>9} {loss:.2f}" for lr, loss in each["loss_by_lr"].items())
        print(f"{each['optimizer']} {each['depth']}+{each['depth']} {each['arm']:12}{losses}")


def verdict(table: Sequence[dict[str, Any]]) -> list[str]:
    """For each depth: where sigma rescues post-LN, and where the start of the weights alone does so, too."""
    lines = []
    for optimizer, depth in dict.fromkeys((each["optimizer"], each["depth"]) for each in table):
        ours = {each["arm"]: each for each in table if (each["optimizer"], each["depth"]) == (optimizer, depth)}
        trains = {arm: {lr for lr, share in each["trained_by_lr"].items() if share > 0.5} for arm, each in ours.items()}
        rescued = sorted(trains["sigma"] - trains["post-LN"], key=float)
        beyond = [lr for lr in rescued if lr not in trains["init-scale"]]
        if rescued:
            tried = len(ours["sigma"]["trained_by_lr"])
            where = f"at {len(rescued)} of {tried} learning rates sigma trains and post-LN does not; "
            where += f"of these the start alone does not explain {', '.join(beyond) or 'any'}"
        elif trains["sigma"]:
            where = "sigma trains nowhere that post-LN does not"
        else:
            where = "sigma does not train"
        lowest = min(ours.values(), key=lambda each: each["loss"])
        best = f"lowest loss: {lowest['arm']}, {lowest['loss']:.2f}" if math.isfinite(lowest["loss"]) else "all broke"
        lines.append(f"{optimizer} {depth}+{depth}: {where}; {best}")
    return lines


def loss_of(place: RunPlace) -> float:
    """On the validation set; infinite for a run that broke."""
    result = read_run(place.folder).result or {"status": "error", "metrics": {}}
    loss = result["metrics"].get("eval_loss", math.inf)
    return loss if result["status"] == "finished" and math.isfinite(loss) else math.inf


if __name__ == "__main__":
    main()
