"""What attention statistics cost on a CPU: time beside the fused attention forward, and memory.

    python benchmarks/attention_cost.py            # about five minutes on 2 cores
    python benchmarks/attention_cost.py --quick    # does it run? seconds, small sizes, no numbers worth keeping

Time: `attention_stats(q, k)` over `scaled_dot_product_attention(q, k, v)` without gradient, same tensors, all threads;
the median ratio over paired rounds, smallest and largest beside it. Memory: how much further than the inputs the
resident memory of a process of its own grows (VmHWM), and how far it grows in the fused attention. The numbers are
checked against float64 first.

Writes results/attention_cost.json.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

import trimtab as tt
from trimtab.attention import attention_stats_reference

# What it is called, then batch, heads, tokens, features of a head.
SHAPES = {
    "512 tokens": (4, 12, 512, 64),
    "2048 tokens": (1, 12, 2048, 64),
    "4096 tokens": (1, 12, 4096, 64),
    "small ViT": (64, 4, 17, 16),
}
QUICK_SHAPES = {"256 tokens": (1, 2, 256, 64), "small ViT": (64, 4, 17, 16)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shape, generator=draws).to(dtype) for _ in range(3))
    return query * 3, key, value  # logits about 3, so that the weights are neither even nor one-hot


@torch.no_grad()
def time_ratio(shape: tuple[int, ...], dtype: torch.dtype, causal: bool, rounds: int) -> dict[str, Any]:
    query, key, value = inputs(shape, dtype)
    fused = partial(F.scaled_dot_product_attention, query, key, value, is_causal=causal)
    stats = partial(tt.attention_stats, query, key, is_causal=causal)
    repeats = 1 if shape[2] > 100 else 20
    ratios = measure.paired(_times(fused, repeats), _times(stats, repeats), rounds, "cpu")
    fused_ms = 1e3 * min(measure.timed(_times(fused, repeats), "cpu") for _ in range(5)) / repeats
    return {"ratios": ratios, "median": statistics.median(ratios), "fused_ms": fused_ms}


def _times(function: Any, repeats: int) -> Any:
    def repeated() -> None:
        for _ in range(repeats):
            function()

    return repeated


def largest_error(shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> float:
    """Of the entropy, in nats, beside float64 on the same inputs."""
    query, key, _ = inputs((1, 1, *shape[2:]), dtype)
    measured = tt.attention_stats(query, key, is_causal=causal).entropy.double()
    return float((measured - attention_stats_reference(query, key, is_causal=causal).entropy).abs().max())


@torch.no_grad()
def memory_in_this_process(what: str, tokens: int) -> float:
    """MiB that the peak of resident memory rises above what the inputs hold."""
    query, key, _ = inputs((1, 1, tokens, 64), torch.float32)
    functions: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "attention_stats": lambda q, k: tt.attention_stats(q, k),
        "attention_stats, causal": lambda q, k: tt.attention_stats(q, k, is_causal=True),
        "fused attention": lambda q, k: F.scaled_dot_product_attention(q, k, k),
    }
    functions[what](query[..., :128, :], key[..., :128, :])  # libraries load, threads start
    before, _ = measure.resident_memory()
    functions[what](query, key)
    _, peak = measure.resident_memory()
    return max(0, peak - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", nargs=2, metavar=("WHAT", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        what, tokens = arguments.memory
        print(json.dumps(memory_in_this_process(what, int(tokens))))
        return

    shapes, rounds = (QUICK_SHAPES, 3) if arguments.quick else (SHAPES, arguments.rounds)
    tokens = 2048 if arguments.quick else 16384
    name = "attention_cost_quick" if arguments.quick else "attention_cost"
    results: dict[str, Any] = {"seed": 0, "rounds": rounds, "time": {}, "memory_mib": {}}
    print(f"time over the fused attention forward, {torch.get_num_threads()} threads: median (smallest-largest)")
    for label, shape in shapes.items():
        for kind, dtype in DTYPES.items():
            for causal in (False, True):
                error = largest_error(shape, dtype, causal)
                row = {"shape": shape, "error_nats": error, **time_ratio(shape, dtype, causal, rounds)}
                key = f"{label}, {kind}{', causal' if causal else ''}"
                results["time"][key] = row
                spread = measure.spread(row["ratios"])
                print(f"  {key:34} {spread:24} fused {row['fused_ms']:8.2f} ms   error {error:.1e} nats", flush=True)
    print(f"memory beyond the inputs, one head of 64, {tokens} x {tokens} (MiB)")
    for what in ("attention_stats", "attention_stats, causal", "fused attention"):
        mib = measure.in_child(__file__, "--memory", what, str(tokens))
        results["memory_mib"][what] = {"tokens": tokens, "mib": mib}
        print(f"  {what:34} {mib:.1f}", flush=True)
    print("written:", measure.write(name, results))


if __name__ == "__main__":
    main()
