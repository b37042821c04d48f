"""What the refresh costs by itself: one step of the singular vectors of all weights, over the time to read those twice.

    python benchmarks/spectral_refresh.py                    # 3 minutes on 2 cores
    python benchmarks/spectral_refresh.py --device cuda      # a minute on a GPU

Every power iteration reads a weight twice, W u and W^T v: no refresh can be faster than that. The floor is measured on
the memory the weights lie in: in every round the fastest of a sum, a norm and a maximum over it, times two, next to
one tt.refresh_ of the model. Printed for each number of vectors: the refresh over this floor, the refresh over that of
one vector (the published algorithm), and milliseconds; medians of the rounds, smallest and largest beside them.

Weights: 12 of 3072 x 768; one of 4096 x 4096; one of 4096 x 11008; all of a ViT-B/16; and 48 small ones of 64 x 64,
refreshed as one model and one after the other (they fit into the cache, so their floor says little).

Writes results/spectral_refresh_<device>.json.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import measure
import torch
from torch import Tensor, nn

import trimtab as tt

VECTORS = (1, 2, 4, 8)
SMALL = "48 of 64 x 64"
Shapes = Sequence[tuple[int, int]]


def weight_sets() -> dict[str, Shapes]:
    block = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    return {
        "12 of 3072 x 768": [(3072, 768)] * 12,
        "4096 x 4096": [(4096, 4096)],
        "4096 x 11008": [(4096, 11008)],
        "all of ViT-B/16": [(768, 768), *block * 12, (1000, 768)],
        SMALL: [(64, 64)] * 48,
    }


def model_of(shapes: Shapes, device: str) -> tuple[nn.ModuleList, Tensor]:
    """Return Linear layers with weights of these shapes, one after the other in one piece of memory, and that piece."""
    torch.manual_seed(0)
    flat = torch.randn(sum(rows * columns for rows, columns in shapes), device=device)
    model = nn.ModuleList()
    for (rows, columns), piece in zip(shapes, flat.split([rows * columns for rows, columns in shapes]), strict=True):
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(piece.view(rows, columns))
        model.append(layer)
    return model, flat


def readers(flat: Tensor) -> list[Callable[[], Tensor]]:
    return [flat.sum, partial(torch.linalg.vector_norm, flat), flat.amax]


def over_floor(model: nn.Module, flat: Tensor, rounds: int, device: str) -> tuple[list[float], list[float]]:
    """Return refresh / floor and the seconds of a refresh, round by round."""
    refresh = partial(tt.refresh_, model)
    for function in (*readers(flat), refresh) * 2:
        function()
    ratios, seconds = [], []
    for i in range(rounds):
        # Each goes first every other round, so that a drift of the machine's speed favours neither.
        first = measure.timed(refresh, device) if i % 2 else 0.0
        floor = 2 * min(measure.timed(read, device) for read in readers(flat))
        seconds.append(first or measure.timed(refresh, device))
        ratios.append(seconds[-1] / floor)
    return ratios, seconds


def one_by_one(model: nn.ModuleList) -> None:
    for layer in model:
        tt.refresh_(layer)


def measured(shapes: Shapes, vectors: Sequence[int], rounds: int, device: str) -> list[dict[str, Any]]:
    """Measure one set of weights with each number of vectors."""
    plain, flat = model_of(shapes, device)
    models = {k: sharing_weights(plain, k) for k in sorted({1, *vectors})}
    rows = []
    for k in vectors:
        ratios, seconds = over_floor(models[k], flat, rounds, device)
        row: dict[str, Any] = {"vectors": k, "over_floor": ratios, "seconds": seconds}
        first, second = (partial(tt.refresh_, models[key]) for key in (1, k))
        row["over_one_vector"] = measure.paired(first, second, rounds, device)
        if len(shapes) > 1 and max(rows * columns for rows, columns in shapes) <= 64 * 64:
            row["one_by_one"] = measure.paired(second, partial(one_by_one, models[k]), rounds, device)
        rows.append(row)
    return rows


def sharing_weights(plain: nn.ModuleList, vectors: int) -> nn.ModuleList:
    """Return a converted copy of a model that has the very weights of the model."""
    weights = {id(parameter): parameter for parameter in plain.parameters()}
    return tt.reparametrize_(copy.deepcopy(plain, weights), tt.SigmaReparam(vectors=vectors))


def describe(row: dict[str, Any]) -> str:
    milliseconds = statistics.median(row["seconds"]) * 1000
    words = f"{row['vectors']} vectors: {measure.spread(row['over_floor'])} x floor, "
    words += f"{measure.spread(row['over_one_vector'])} x one vector, {milliseconds:.2f} ms"
    return words + (f", one by one {measure.spread(row['one_by_one'])} x that" if "one_by_one" in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="two rounds, small weights: does it run?")
    arguments = parser.parse_args()
    rounds, name = arguments.rounds, f"spectral_refresh_{arguments.device}"
    sets = weight_sets()
    if arguments.quick:
        rounds, name, sets = 2, name + "_quick", {"256 x 512": [(256, 512)], SMALL: sets[SMALL]}
    results: dict[str, Any] = {}
    for title, shapes in sets.items():
        results[title] = measured(shapes, VECTORS, rounds, arguments.device)
        path = measure.write(name, {"weights": results})
        for row in results[title]:
            print(f"{title:18} {describe(row)}", flush=True)
    print(path)


if __name__ == "__main__":
    main()
