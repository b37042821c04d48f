"""How far the sigma that is used lies below the true one when the learning rate is high, by number of vectors.

    python benchmarks/spectral_error.py                # about 10 minutes on 2 cores
    python benchmarks/spectral_error.py --seeds 2      # the smallest useful table
    python benchmarks/spectral_error.py --quick        # does it run?

The digits ViT with sigma-Reparam from gamma 1 and weights N(0, 0.4²), no LayerNorm, 200 steps of AdamW at a constant
learning rate. After every optimizer step ``true / estimate - 1`` of every row block of every weight: the true sigma by
a singular value decomposition in float64, the estimate v^T W u of the vectors that the next forward uses. Printed are
the mean over all weights and steps, the mean over the steps of the worst weight, and the worst of all; of the seeds the
median and the largest. One vector, refreshed once a step, is the published algorithm; "refreshed twice" is the control
that spends the time of more vectors on more iterations of one. Next to the errors their price: the refresh of 12
weights of 3072 x 768 over the time to read them twice, and over that of one vector (spectral_refresh.py has more).

Writes results/spectral_error.json after every run.
"""

import argparse
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, NamedTuple

import measure
import spectral_refresh
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt
from trimtab.models.vit import ViT
from trimtab.reparam import sigma_gamma
from trimtab.tasks.images import vit_digits
from trimtab.tasks.images.sets import load_images
from trimtab.train.order import batches

LRS = (1e-2, 3e-2)
PRICED = spectral_refresh.weight_sets()["12 of 3072 x 768"]


class Arm(NamedTuple):
    vectors: int
    refreshes: int  # a step

    def __str__(self) -> str:
        return f"{self.vectors}" + (", refreshed twice" if self.refreshes == 2 else "")


ARMS = (Arm(1, 1), Arm(1, 2), Arm(2, 1), Arm(3, 1), Arm(4, 1), Arm(6, 1), Arm(8, 1))


def run(arm: Arm, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once; return what the table shows of the errors, and the last loss."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model = replace(vit_digits().model, norm="none", init="normal", init_std=0.4)
    recipe = replace(vit_digits(), model=model, lr=lr, seed=seed)
    data = load_images(recipe.data)
    torch.manual_seed(seed)
    config = tt.SigmaReparam(gamma_init="one", vectors=arm.vectors)
    model = tt.reparametrize_(ViT(recipe.model), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=recipe.weight_decay, fused=True)
    order = batches(data.train.size, recipe.batch_size, seed)
    errors = []
    for _ in range(steps):
        batch = next(order)
        images = data.standardize(data.train.read(batch, None))
        loss = F.cross_entropy(model(images), data.train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # refreshes the vectors once
        for _ in range(arm.refreshes - 1):
            tt.refresh_(model)
        errors.append(torch.cat(list(errors_of(model))))
    found = torch.stack(errors)  # (steps, row blocks)
    of_steps = found.max(dim=1).values
    return {
        "mean": float(found.mean()),
        "worst weight": float(of_steps.mean()),
        "worst": float(of_steps.max()),
        "loss": float(loss.detach()),
    }


@torch.no_grad()
def errors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield ``true / estimate - 1`` of the row blocks of each weight."""
    for name, (estimates, _) in sigma_gamma(model).items():
        matrix = model.get_parameter(name).double().flatten(1)
        true = [torch.linalg.svdvals(block)[0] for block in matrix.chunk(len(estimates))]
        yield torch.stack(true) / estimates - 1


def prices(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return for each arm the refresh over its floor and over that of one vector; alone on the machine."""
    rows = spectral_refresh.measured(PRICED, sorted({arm.vectors for arm in ARMS}), rounds, "cpu")
    by_vectors = {row["vectors"]: row for row in rows}
    return {
        str(arm): {
            name: [arm.refreshes * ratio for ratio in by_vectors[arm.vectors][name]]
            for name in ("over_floor", "over_one_vector")
        }
        for arm in ARMS
    }


def table(runs: dict[str, dict[str, Any]], price: dict[str, dict[str, list[float]]], seeds: int) -> None:
    print("true / estimate - 1, over all weights and steps: median of the seeds (largest)")
    for lr in LRS:
        heads = ("mean", "worst weight", "worst", "refresh / floor", "/ one vector")
        print(f"{f'LR {lr:g}, vectors':20}" + "".join(f"{head:>20}" for head in heads))
        for arm in ARMS:
            cells = []
            for what in ("mean", "worst weight", "worst"):
                values = [runs[key(arm, lr, seed)][what] for seed in range(seeds)]
                cells.append(f"{statistics.median(values):.5f} ({max(values):.5f})")
            cells += [f"{statistics.median(price[str(arm)][name]):.2f}" for name in ("over_floor", "over_one_vector")]
            print(f"{arm!s:20}" + "".join(f"{cell:>20}" for cell in cells))


def key(arm: Arm, lr: float, seed: int) -> str:
    return f"{arm} | {lr:g} | {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    seeds, steps, name = arguments.seeds, 200, "spectral_error"
    if arguments.quick:
        seeds, steps, name = 1, 10, "spectral_error_quick"
    price = prices(3 if arguments.quick else 15)  # before the runs, which keep both cores busy
    runs: dict[str, dict[str, Any]] = {}
    wanted = [(arm, lr, seed) for seed in range(seeds) for arm in ARMS for lr in LRS]
    # not forked: this process has used torch's threads
    with ProcessPoolExecutor(1 if arguments.quick else 2, get_context("spawn")) as pool:
        found = pool.map(run, *zip(*wanted, strict=True), [steps] * len(wanted))
        for each, outcome in zip(wanted, found, strict=True):
            runs[key(*each)] = outcome
            path = measure.write(name, {"steps": steps, "refresh": price, "runs": runs})
            print(f"{key(*each):30} mean {outcome['mean']:.5f} worst {outcome['worst']:.4f}", flush=True)
    table(runs, price, seeds)
    print(path)


if __name__ == "__main__":
    main()
