"""How far the sigma that `Watch` logs for plain weights lies below the true one, by how often it is read.

    python benchmarks/sigma_tracking.py            # about 2 minutes on 2 cores
    python benchmarks/sigma_tracking.py --quick    # does it run?

The digits ViT of `trimtab train vit-digits` (pre-LN, plain weights), 200 steps of AdamW at a constant learning rate: a
tame one, a high one, one at which it fails. A tracker that is read after every step and two that are read after every
20th, with one iteration and with up to four. Of every reading after the first (which is exact) ``true / read - 1`` of
every weight, the true sigma by a singular value decomposition in float64: the mean, the 99th percentile, the largest,
and the smallest (below zero only by rounding, as the value read is a lower bound).

Writes results/sigma_tracking.json.
"""

import argparse

import measure
import torch
import torch.nn.functional as F

from trimtab.models.vit import ViT
from trimtab.tasks.images.recipes import vit_digits
from trimtab.tasks.images.sets import load_images
from trimtab.train.order import batches
from trimtab.watch.signals.sigmas import SigmaTracker
from trimtab.watch.signals.weights import plain_weights

LRS = (1e-3, 1e-2, 3e-2)
CASES = {(every, most): f"every {every}, {'1' if most == 1 else 'up to 4'}" for every in (1, 20) for most in (1, 4)}


def run(lr: float, seed: int, steps: int) -> dict[tuple[int, int], list[float]]:
    """Train once; return the errors of all readings of each case."""
    torch.manual_seed(seed)
    data, model = load_images("digits"), ViT(vit_digits().model)
    optimizer, order = torch.optim.AdamW(model.parameters(), lr, fused=True), batches(data.train.size, 64, seed)
    weights = plain_weights(model)
    trackers = {case: SigmaTracker(iterations=case[1]) for case in CASES}
    errors: dict[tuple[int, int], list[float]] = {case: [] for case in CASES}
    for tracker in trackers.values():
        tracker.read(weights)
    for step in range(1, steps + 1):
        batch = next(order)
        images = data.standardize(data.train.read(batch, None))
        loss = F.cross_entropy(model(images), data.train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        true = {name: torch.linalg.matrix_norm(w.detach().double().flatten(1), 2).item() for name, w in weights.items()}
        for case, tracker in trackers.items():
            if step % case[0] == 0:
                read = tracker.read(weights).sigma
                errors[case] += [true[name] / read[name][0] - 1 for name in weights]
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    steps = 20 if arguments.quick else 200
    rows = []
    print(f"{'LR':>6}  {'read':34} {'mean':>8} {'99 %':>8} {'largest':>8} {'smallest':>9}")
    for lr in LRS:
        runs = [run(lr, seed, steps) for seed in range(arguments.seeds)]
        for case, name in CASES.items():
            found = torch.tensor([error for errors in runs for error in errors[case]], dtype=torch.float64)
            row = {"lr": lr, "every": case[0], "iterations": case[1], "readings": len(found)}
            row |= {"mean": found.mean().item(), "p99": found.quantile(0.99).item()}
            row |= {"largest": found.max().item(), "smallest": found.min().item()}
            rows.append(row)
            numbers = f"{row['mean']:8.4f} {row['p99']:8.4f} {row['largest']:8.4f} {row['smallest']:9.1e}"
            print(f"{lr:6g}  {name:34} {numbers}", flush=True)
    if not arguments.quick:
        print(measure.write("sigma_tracking", {"seeds": arguments.seeds, "steps": steps, "rows": rows}))


if __name__ == "__main__":
    main()
