"""What it takes to convert a model of a billion parameters on CPU: seconds, and memory above the model's own.

    python benchmarks/spectral_conversion.py             # about 8 minutes on 2 cores; needs 6 GB of memory
    python benchmarks/spectral_conversion.py --quick     # does it run?

The model is 20 blocks 2048 wide, each of six Linear layers (query, key, value, output, and an MLP four times as wide):
1.007 billion parameters drawn from N(0, 0.02²), whose leading singular values lie close together, the hard case.
tt.reparametrize_ with its defaults runs in a process of its own, in float32 and in bfloat16, --repeats times. Printed:
seconds, and the growth of the resident memory from before the model was made to its peak, over the bytes of the
parameters. Beside it what singular value decompositions would take: one weight of each shape is decomposed in full and
the time multiplied by their number, an extrapolation and marked as such.

Writes results/spectral_conversion.json.
"""

import argparse
import json
import statistics
from collections import Counter
from typing import Any

import measure
import torch
from torch import nn

import trimtab as tt

WIDTH, BLOCKS = 2048, 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shapes(width: int, blocks: int) -> list[tuple[int, int]]:
    return [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)] * blocks


def build(width: int, blocks: int, dtype: torch.dtype) -> nn.Module:
    layers = [
        nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype) for rows, columns in shapes(width, blocks)
    ]
    model = nn.ModuleList(layers).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def convert_here(width: int, blocks: int, dtype: torch.dtype) -> dict[str, float]:
    """Convert in this process, which has done nothing else."""
    tt.reparametrize_(build(256, 1, dtype))  # libraries count as resident memory once they are used
    before, _ = measure.resident_memory()
    model = build(width, blocks, dtype)
    seconds = measure.timed(lambda: tt.reparametrize_(model), "cpu")
    _, peak = measure.resident_memory()
    own = sum(parameter.nbytes for name, parameter in model.named_parameters() if name.endswith("weight"))
    return {"seconds": seconds, "own_bytes": own, "peak_bytes": peak - before}


def decompositions(width: int, blocks: int) -> dict[str, Any]:
    """Time a full decomposition of one float32 weight of each shape, and extrapolate to all of them."""
    rows, total = [], 0.0
    for shape, count in Counter(shapes(width, blocks)).items():
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(shape, generator=generator)
        seconds = measure.timed(lambda m=matrix: torch.linalg.svd(m, full_matrices=False), "cpu")
        rows.append({"shape": shape, "count": count, "seconds_of_one": seconds})
        total += count * seconds
    return {"measured": rows, "extrapolated_seconds": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--convert", choices=DTYPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = (256, 2) if arguments.quick else (WIDTH, BLOCKS)
    if arguments.convert:
        print(json.dumps(convert_here(*size, DTYPES[arguments.convert])))
        return
    name = "spectral_conversion" + ("_quick" if arguments.quick else "")
    results: dict[str, Any] = {"parameters": sum(rows * columns for rows, columns in shapes(*size))}
    for dtype in DTYPES:
        flags = ["--convert", dtype] + (["--quick"] if arguments.quick else [])
        runs = [measure.in_child(__file__, *flags) for _ in range(arguments.repeats)]
        results[dtype] = runs
        measure.write(name, results)
        seconds = [run["seconds"] for run in runs]
        ratio = statistics.median(run["peak_bytes"] / run["own_bytes"] for run in runs)
        print(
            f"{dtype:9} {results['parameters'] / 1e9:.3f} billion parameters, {runs[0]['own_bytes'] / 1e9:.2f} GB: "
            f"{measure.spread(seconds)} s, peak memory {ratio:.3f} x the model's own",
            flush=True,
        )
    results["full_svd"] = decompositions(*size)
    print(
        f"full decompositions of all weights, extrapolated from one of each shape: "
        f"{results['full_svd']['extrapolated_seconds']:.0f} s"
    )
    print(measure.write(name, results))


if __name__ == "__main__":
    main()
