"""How long an epoch of SAMformer takes, trained with SAM, and how much memory; against the products in the plain order.

    python benchmarks/forecast_speed.py            # about four minutes on 2 cores, which must be free
    python benchmarks/forecast_speed.py --quick    # does it run?

ETTh1, look-back 512, horizon 96, batches of 256, float32, the form of the authors' port to PyTorch (values of L steps
by one L × L layer). Each row is a process of its own, so that memory is its own, and trains through the engine with
Watch off; rows take turns, so that a drift of the machine's speed favours none:

  fused     value and head multiplied first, (A X W_V) W_H = A (X (W_V W_H)): what `SAMformer` does by itself
  plain     the same model in the plain order of products
  factored  the form of the authors' main code, values of 16 features
  720       fused, horizon 720
  tight     fused, with MALLOC_MMAP_THRESHOLD_=500000: glibc then hands freed blocks back instead of keeping them
  720-tight the same at horizon 720

Prints seconds an epoch: median (smallest-largest) over epochs of all rounds, evaluation aside; resident memory at its
highest, and before data and model are made, torch and the engine alone; and what horizon 720 adds beside its head,
whose parameters Adam holds three times, gradient and SAM's copy once each. Writes results/forecast_speed.json. Beside
it, for orientation: the authors' port took 1.24 s and 1,078 MB on such a machine.

Memory is also that of packages: torch's optimisers load torch._dynamo, and that triton, where it is installed; Fabric
loads torchmetrics, where it is. With `pip install trimtab[lab]` neither is, in the environment of the tests both are
(200 MB more). The results name which of them were loaded.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from typing import Any

import measure
import torch

from trimtab.models import samformer
from trimtab.models.forecasting import ForecastModelConfig
from trimtab.tasks.forecasting.recipes import SAM, published
from trimtab.train import train

ROWS = {
    "fused": ("full", 96),
    "plain": ("full", 96),
    "factored": ("factored", 96),
    "720": ("full", 720),
    "tight": ("full", 96),
    "720-tight": ("full", 720),
}
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "500000"}
BATCH = 256


def one(row: str, epochs: int) -> dict[str, Any]:
    """Train in this process, and tell its epochs' seconds and its memory in bytes."""
    form, horizon = ROWS[row]
    if row == "plain":
        samformer.SAMformer._multiplies_first = lambda self, batch: False  # type: ignore[method-assign]
    model = ForecastModelConfig(lookback=512, horizon=horizon, form=form)
    made = published("ETTh1", model, stabilizer=SAM, watch=False, batch_size=BATCH)
    epoch = (8640 - 512 - horizon + 1) // BATCH
    made = replace(made, steps=epochs * epoch, watch_every=epoch, eval_every=epoch * epochs, patience=None)
    made = replace(made, checkpoint_every=made.steps, restart_every=5 * epoch)
    before = measure.resident_memory()[0]
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        result = train(made, folder, lambda progress: seconds.append(progress.seconds))
    # the engine's own clock of a step, which evaluation, log and checkpoint do not count in
    each = [later - earlier for earlier, later in pairwise(seconds[1:-1])]
    return {
        "row": row,
        "epoch_seconds": each or [result.step_seconds * epoch],
        "by_median_step": result.step_seconds * epoch,
        "memory_before": before,
        "memory": result.peak_memory_bytes,
        "steps_an_epoch": epoch,
        "threads": torch.get_num_threads(),
        "loaded": [name for name in ("torch._dynamo", "triton", "torchmetrics") if name in sys.modules],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few epochs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--row", choices=list(ROWS), help="for the processes that it starts")
    options = parser.parse_args()
    epochs, rounds = (5, 1) if options.quick else (12, options.rounds)
    if options.row:
        print(json.dumps(one(options.row, epochs)))
        return
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for turn in range(rounds):
        for row in list(ROWS)[:: 1 if turn % 2 == 0 else -1]:
            command = ["--row", row, *["--quick"] * options.quick]
            environment = TIGHT if row.endswith("tight") else {}
            found[row].append(measure.in_child(sys.argv[0], *command, **environment))
    table = {row: summary(runs) for row, runs in found.items()}
    print(f"{'':10}{'seconds an epoch':>24}{'highest MB':>12}{'MB before':>11}")
    for row, each in table.items():
        print(
            f"{row:10}{measure.spread(each['epoch_seconds']):>24}{each['memory'] / 1e6:>12.0f}"
            f"{each['memory_before'] / 1e6:>11.0f}"
        )
    head = 4 * (720 - 96) * 513 * 6  # bytes: weight and bias, gradient, two moments, SAM's copy, that of the best
    for long, short in (("720", "fused"), ("720-tight", "tight")):
        more = (table[long]["memory"] - table[short]["memory"]) / 1e6
        print(f"{long} over {short}: {more:+.0f} MB; of the head, with all that is kept of it: {head / 1e6:.0f} MB")
    ratios = [p / f for p, f in zip(table["plain"]["medians"], table["fused"]["medians"], strict=True)]
    print(f"plain over fused, round by round: {measure.spread(ratios)}")
    if not options.quick:
        print("written to", measure.write("forecast_speed", {"rows": table, "plain_over_fused": ratios}))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "epoch_seconds": [value for run in runs for value in run["epoch_seconds"]],
        "medians": [statistics.median(run["epoch_seconds"]) for run in runs],
        "memory": max(run["memory"] for run in runs),
        "memory_before": statistics.median(run["memory_before"] for run in runs),
        "steps_an_epoch": runs[0]["steps_an_epoch"],
        "threads": runs[0]["threads"],
        "loaded": runs[0]["loaded"],
    }


if __name__ == "__main__":
    main()
