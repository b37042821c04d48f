"""Does token embedding variability stand in for the variance of gradients, and is it the cheaper one?

    python benchmarks/tev.py                # 54 runs, about 35 minutes on 2 idle cores; killed, it goes on
    python benchmarks/tev.py --seeds 1      # the smallest useful table, about 11 minutes
    python benchmarks/tev.py --gpu          # the models and runs of depth_lm.py --gpu: results/tev_gpu
    python benchmarks/tev.py --quick        # 4 layers, two learning rates, one seed, 10 steps: does it run?

Chung et al. (arXiv 2409.07787) propose TEV, the standard deviation of the entries of each token's embedding, as a cheap
stand-in for the variance of gradients in pre-LN language models. Here the vanilla GPTs of depth_lm.py, of 12, 24 and 48
layers, train at six learning rates, and both are logged every 5 steps (the runs lie in runs/depth_lm, where each of
the two benchmarks finds those of the other):

  mu, sigma   mean and standard deviation of TEV over the vocabulary
  entries     variance over the entries of one gradient: of the blocks together (median of the blocks), of the
              shallowest quarter of them, of the embedding
  batches     how much gradients differ from one half of a batch to the other (the trace of their covariance), at the
              first step and every 200: the variance that takes a second gradient

Spearman's rank correlations with 95 % bootstrap intervals over runs:

  over runs    of the values at the end: TEV at the last step, the median of the variances over the last half
  same cell    the same among runs of one learning rate and depth, which is what a stand-in must be good for: what
               merely follows the learning rate correlates over runs, too
  over time    within a run, over its steps after the warmup; the median of the runs
  with loss    over runs, of each of these with the loss on the held-out text at the end

Cost: TEV and the variance over entries, in one process, over a training step and over each other, also at the sizes of
GPT-2 (50,257 tokens, 768 features, 12 layers), as medians of alternating measurements.

Last, for each pair, whether TEV stands in: whether all of the interval within cells lies above 0.7. Writes
results/tev.json with every run, and a picture of TEV against the variances.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import depth_lm
import grids
import measure
import numpy as np
import torch
import torch.nn.functional as F
from rank_correlation import rank_correlation, with_interval, within
from tev_picture import draw

from trimtab.models.gpt import GPT, GPTConfig
from trimtab.report.runlog import Floats, Run, number, read_run
from trimtab.train.compare.grid import RunPlace, plan
from trimtab.watch.signals import embedding_variability
from trimtab.watch.signals.gradients import gradient_moments

DEPTHS = (12, 24, 48)
LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
STANDS_IN = 0.7  # a rank correlation with all of its interval above this, half of the variance of ranks
TEV = ("mu", "sigma")
VARIANCES = ("entries, blocks", "entries, shallow", "entries, embedding", "batches")


def main() -> None:
    arguments = grids.options(__doc__, seeds=3, gpu=True).parse_args()
    name, _ = grids.place("tev", arguments)
    _, folder = grids.place("depth_lm", arguments)
    widths = {4: 24} if arguments.quick else {depth: depth_lm.WIDTHS[depth] for depth in DEPTHS}
    widths = {depth: width * (depth_lm.WIDER if arguments.gpu else 1) for depth, width in widths.items()}
    lrs = LRS[2:4] if arguments.quick else LRS
    seeds = range(1 if arguments.quick else arguments.seeds)
    places = plan(depth_lm.recipes(widths, ["vanilla"], arguments), lrs, seeds, folder)
    depth_lm.train_all(places, arguments)
    series = [curves(read_run(place.folder)) for place in places]
    runs = [row(place, each) for place, each in zip(places, series, strict=True)]
    table = correlations(runs, series)
    cost = costs("cuda" if arguments.gpu and torch.cuda.is_available() else "cpu", quick=arguments.quick)
    show(table, cost)
    print("\n".join(verdict(table, cost)))
    results = {"settings": {"widths": widths, "lr": lrs, "seeds": list(seeds)}, "correlations": table, "cost": cost}
    path = measure.write(name, {**results, "runs": runs})
    print(f"\nwritten to {path} and {draw(runs, name).name}")


def curves(run: Run) -> dict[str, Floats]:
    """What is correlated, at every logged step; NaN where a step has none."""
    by_layer = depth_lm.gradient_variance(run)
    quarter = max(1, by_layer.shape[1] // 4)

    def each(read: Callable[[dict[str, Any]], Any]) -> Floats:
        return np.array([float(read(line)) for line in run.lines], dtype=np.float64)

    return {
        "step": run.steps,
        "mu": each(lambda line: line.get("tev", {}).get("embedding", [math.nan] * 2)[0]),
        "sigma": each(lambda line: line.get("tev", {}).get("embedding", [math.nan] * 2)[1]),
        "entries, blocks": np.median(by_layer, axis=1),
        "entries, shallow": by_layer[:, :quarter].mean(axis=1),
        "entries, embedding": each(lambda line: line.get("grad_variance", {}).get("embedding", math.nan)),
        "batches": _single_readings(each(lambda line: line.get("grad_noise", {}).get("variance", math.nan))),
    }


def _single_readings(averages: Floats) -> Floats:
    """Take Watch's moving average off again: each reading is (average - 0.9 · the one before) / 0.1."""
    found, places = averages.copy(), np.flatnonzero(np.isfinite(averages))
    for before, here in itertools.pairwise(places):
        found[here] = (averages[here] - 0.9 * averages[before]) / 0.1
    return found


def row(place: RunPlace, series: dict[str, Floats]) -> dict[str, Any]:
    """A run in single numbers: TEV at its end, variances as medians over its last half, its loss."""
    result = read_run(place.folder).result or {"status": "error", "metrics": {}}
    half = len(series["step"]) // 2
    return {
        "depth": place.recipe.model.depth,
        "lr": place.recipe.lr,
        "seed": place.recipe.seed,
        "status": result["status"],
        "loss": number(result["metrics"].get("eval_loss")),
        **{name: _last(series[name]) for name in TEV},
        **{name: _median(series[name][half:]) for name in VARIANCES},
    }


def _last(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else math.nan


def _median(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def correlations(runs: Sequence[dict[str, Any]], series: Sequence[dict[str, Floats]]) -> dict[str, dict[str, Any]]:
    """Rank correlations with their intervals, by the names of what is correlated."""
    found: dict[str, dict[str, Any]] = {}
    for tev in TEV:
        for variance in VARIANCES:
            known = [run for run in runs if math.isfinite(run[tev]) and math.isfinite(run[variance])]
            pairs = [(each[tev], each[variance]) for each in series]
            found[f"{tev} ~ {variance}"] = {
                "over runs": over_runs(known, tev, variance),
                "same cell": over_runs(known, tev, variance, cells=True),
                "over time": within([_after_warmup(*pair) for pair in pairs]),
                "runs": len(known),
            }
    for name in (*TEV, *VARIANCES):
        known = [run for run in runs if math.isfinite(run[name]) and math.isfinite(run["loss"])]
        found[f"{name} ~ loss"] = {"over runs": over_runs(known, name, "loss"), "runs": len(known)}
        found[f"{name} ~ loss"]["same cell"] = over_runs(known, name, "loss", cells=True)
    return found


def over_runs(runs: Sequence[dict[str, Any]], x: str, y: str, *, cells: bool = False) -> list[float]:
    """The rank correlation over runs and its interval; within cells of learning rate and depth if asked."""
    if len(runs) < 3:
        return [math.nan] * 3
    xs, ys = (np.array([run[name] for run in runs]) for name in (x, y))
    names = sorted({(run["lr"], run["depth"]) for run in runs})
    groups = np.array([float(names.index((run["lr"], run["depth"]))) for run in runs])
    return with_interval(
        lambda chosen: rank_correlation(xs[chosen], ys[chosen], groups[chosen] if cells else None), len(runs)
    )


def _after_warmup(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    known = np.isfinite(x) & np.isfinite(y)
    known[: len(known) // 10] = False
    return x[known], y[known]


def costs(device: str, *, quick: bool) -> dict[str, dict[str, float]]:
    """Ratios of times: each over a training step, and TEV over the variance over entries."""
    sizes = {"small": GPTConfig(1024, context=64, dim=96, depth=12, num_heads=2)}
    if not quick:
        sizes["GPT-2"] = GPTConfig(50257, context=64, dim=768, depth=12, num_heads=12)
    found = {}
    for name, config in sizes.items():
        model = GPT(config).to(device)
        tokens = torch.randint(config.vocab_size or 1, (16 if name == "small" else 1, 65), device=device)
        parameters = dict(model.named_parameters())

        def step(model: GPT = model, tokens: torch.Tensor = tokens) -> None:
            model.zero_grad()
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()

        def tev(model: GPT = model) -> None:
            embedding_variability(model)

        def entries(parameters: dict[str, torch.nn.Parameter] = parameters) -> None:
            gradient_moments(parameters)

        step()
        rounds = 2 if quick else 20
        found[name] = {"tev / entries": statistics.median(measure.paired(entries, tev, rounds, device))}
        if name == "small":  # a step of one window says nothing of a real one
            found[name]["tev / step"] = statistics.median(measure.paired(step, tev, rounds, device))
            found[name]["entries / step"] = statistics.median(measure.paired(step, entries, rounds, device))
    return found


def show(table: dict[str, dict[str, Any]], cost: dict[str, dict[str, float]]) -> None:
    kinds = ("over runs", "same cell", "over time")
    print(f"\n{'':30}{'runs':>5}" + "".join(f"{kind:>26}" for kind in kinds))
    for name, each in table.items():
        cells = [each.get(kind) for kind in kinds]
        told = ["-" if cell is None else f"{cell[0]:.2f} ({cell[1]:.2f} to {cell[2]:.2f})" for cell in cells]
        print(f"{name:30}{each['runs']:>5}" + "".join(f"{text:>26}" for text in told))
    for name, ratios in cost.items():
        print(f"cost, {name}: " + ", ".join(f"{what} {ratio:.3f}" for what, ratio in ratios.items()))


def verdict(table: dict[str, dict[str, Any]], cost: dict[str, dict[str, float]]) -> list[str]:
    """Whether TEV stands in for each variance: among runs of one learning rate and depth, with its interval."""
    lines = []
    for tev, variance in itertools.product(TEV, VARIANCES):
        rho, low, high = table[f"{tev} ~ {variance}"]["same cell"]
        if not math.isfinite(low):
            answer = "too few runs to tell"
        elif low > STANDS_IN:
            answer = "stands in"
        elif low > 0:
            answer = "goes with it, too loosely to stand in"
        else:
            answer = "goes against it" if high < 0 else "not told apart from no connection"
        lines.append(f"TEV's {tev} for the variance, {variance}: {answer} (rho {rho:.2f}, {low:.2f} to {high:.2f})")
    for name, ratios in cost.items():
        lines.append(f"{name}: TEV costs {ratios['tev / entries']:.3f} times what the variance over entries costs")
    return lines


if __name__ == "__main__":
    main()
