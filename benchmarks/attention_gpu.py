"""Attention statistics on a GPU: exactness, time beside a flash attention forward, memory, a watched training run.

    python benchmarks/attention_gpu.py          # under 5 minutes on one GPU
    python benchmarks/attention_gpu.py --dry    # does it run? the program interpreted on CPU, tiny, nothing kept

First the numbers are checked against the float64 definition. Then `trimtab.attention.triton_kernel.row_stats` takes
turns with torch's `scaled_dot_product_attention` on the same query and key, forward only: its flash kernel for bfloat16
and float16, the memory-efficient one for float32, which flash refuses. 16,384 tokens a batch, 2,048 features over all
heads. Printed is the median of the paired ratios, smallest and largest beside it; the statistics need no product with
the values, so below 1 is to be expected and .6 is the aim for flash. "torch" is the same statistics by plain torch
operations, which GPUs without Triton fall back on.

Memory is what one head of 64 features and 16,384 tokens needs at its peak beyond the inputs. The training run is 12
blocks of GPT-2's size in bfloat16 autocast, watched at every=20 and unwatched, from copies of one model; whether the
weights end bit-identical is asked with torch's deterministic algorithms, and the time taken without them.

Writes results/attention_gpu.json after every row.
"""

import argparse
import copy
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
import torch.nn.functional as F
from spectral_cost import Block
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from watch_cost import same_weights

import trimtab as tt
from trimtab.attention import attention_stats_reference
from trimtab.attention.checks import described
from trimtab.attention.chunks import streamed_stats
from trimtab.attention.triton_kernel import row_stats, supports

EPS32 = torch.finfo(torch.float32).eps
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Case(NamedTuple):
    dtype: str
    features: int
    tokens: int
    causal: bool
    arm: str = "triton"


def cases() -> Iterator[Case]:
    """What is to be measured, the most telling first."""
    for features, tokens, causal in itertools.product((64, 128), (2048, 8192), (True, False)):
        yield Case("bfloat16", features, tokens, causal)
    for features, tokens in itertools.product((64, 128), (1024, 4096, 16384)):
        yield Case("bfloat16", features, tokens, True)
    yield Case("bfloat16", 80, 4096, True)
    yield Case("bfloat16", 256, 4096, True)
    yield Case("float16", 64, 4096, True)
    for features, tokens in ((64, 2048), (64, 8192), (128, 4096)):
        yield Case("float32", features, tokens, True)
    for tokens in (2048, 8192):
        yield Case("bfloat16", 64, tokens, True, "torch")


def inputs(case: Case, device: str, dry: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, batch = (64, 2, 1) if dry else (case.tokens, 2048 // case.features, 16384 // case.tokens)
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, tokens, heads, case.features)  # as a projection leaves it: heads inside tokens
    query, key, value = torch.randn(shape, generator=generator).to(device, DTYPES[case.dtype]).transpose(2, 3)
    return query, key, value


def fused(case: Case, device: str) -> AbstractContextManager[Any]:
    if device == "cpu":
        return nullcontext()
    return sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if case.dtype == "float32" else SDPBackend.FLASH_ATTENTION)


def time_row(case: Case, device: str, dry: bool) -> dict[str, Any]:
    query, key, value = inputs(case, device, dry)
    call = described(query, key, is_causal=case.causal)
    if not (dry or supports(call)):
        raise RuntimeError(f"the program does not support {case} here")
    statistics = partial(row_stats if case.arm == "triton" else streamed_stats, call)
    attention = partial(F.scaled_dot_product_attention, query, key, value, is_causal=case.causal)
    with torch.no_grad(), fused(case, device):
        start = time.perf_counter()
        measure.timed(statistics, device)
        first = time.perf_counter() - start
        for function in (statistics, attention):
            measure.timed(function, device)
        # Many calls a round, so that the GPU's queue of work is full as it is in training.
        seconds = measure.timed(attention, device)
        count = 1 if dry else max(4, math.ceil(0.03 / seconds))
        first_of, second_of = (partial(repeat, function, count) for function in (attention, statistics))
        ratios = measure.paired(first_of, second_of, 2 if dry else 11, device)
        seconds = measure.timed(first_of, device) / count
    return {"ratios": ratios, "attention_seconds": seconds, "first_call_seconds": first}


def repeat(function: Callable[[], object], count: int) -> None:
    for _ in range(count):
        function()


def check(device: str, dry: bool) -> str:
    """Compare with the definition: entropies of float32 to 1e-4 nats, of half precision too, given its inputs."""
    worst = 0.0
    for dtype, causal, kind in itertools.product(DTYPES, (True, False), ("none", "boolean", "additive")):
        if causal and kind != "none":
            continue
        torch.manual_seed(0)
        L, S = (40, 50) if dry else (1500, 2100)
        query, key = (torch.randn(1, 4, n, 72).mul(3).to(device, DTYPES[dtype]) for n in (L, S))
        mask = {
            "none": None,
            "boolean": (torch.rand(4, L, S) < 0.7).to(device),
            "additive": torch.randn(1, L, S).masked_fill(torch.rand(1, L, S) < 0.3, -torch.inf).to(device),
        }[kind]
        stats, _ = row_stats(described(query, key, attn_mask=mask, is_causal=causal))
        expected = attention_stats_reference(query, key, attn_mask=mask, is_causal=causal)
        error = (stats.entropy - expected.entropy).abs().max().item()
        allowed = 1e-4 + 4 * EPS32 * expected.max_logit.abs().max().item()
        relative = ((stats.logit_norm - expected.logit_norm).abs() / expected.logit_norm.clamp(min=1)).max().item()
        if not (error <= allowed and relative <= 1e-4):
            raise ArithmeticError(f"{dtype}, {kind}: entropy off by {error:.2g} nats, norm by {relative:.2g} of itself")
        worst = max(worst, error)
    return f"entropies lie within {worst:.1e} nats of float64's"


def memory(device: str) -> int:
    """Bytes beyond the inputs, one head of 16,384 tokens."""
    query, key = torch.randn(2, 1, 1, 16384, 64, device=device)
    call = described(query, key)
    row_stats(call)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    row_stats(call)
    return torch.cuda.max_memory_allocated() - before


def watched_run(device: str, dry: bool) -> dict[str, Any]:
    """Whole runs at every=20 from one start, watched over unwatched, and whether their weights end bit-identical."""
    width, depth, heads, context, batch, steps = (32, 1, 2, 16, 2, 2) if dry else (768, 12, 12, 1024, 16, 40)
    texts = torch.randint(512, (batch, context + 1)).to(device)

    torch.manual_seed(0)
    blocks = [Block(width, heads, causal=True) for _ in range(depth)]
    start = nn.Sequential(nn.Embedding(512, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 512)).to(device)

    def run(folder: Path | None) -> nn.Module:
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        watch = None if folder is None else tt.Watch(model, folder, every=20, on_alarm=lambda alarm: None)
        with watch or nullcontext():
            for _ in range(steps):
                with torch.autocast(device, torch.bfloat16):
                    loss = F.cross_entropy(model(texts[:, :-1]).flatten(0, 1), texts[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if watch is not None:
                    watch.step(loss)
        return model

    with tempfile.TemporaryDirectory() as folder:
        folders = (Path(folder) / str(i) for i in itertools.count())
        unwatched, watched = partial(run, None), lambda: run(next(folders))
        torch.use_deterministic_algorithms(True, warn_only=True)  # else two unwatched runs differ as well
        same = same_weights(unwatched(), watched())
        torch.use_deterministic_algorithms(False)
        return {"same_weights": same, "ratios": measure.paired(unwatched, watched, 1 if dry else 3, device)}


def describe(case: Case, row: dict[str, Any]) -> str:
    shape = f"{case.dtype:8} {case.features:3} features {case.tokens:5} tokens {'causal' if case.causal else 'full':6}"
    milliseconds = 1e3 * row["attention_seconds"]
    return f"{case.arm:6} {shape}  {measure.spread(row['ratios'])} of {milliseconds:.3f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry else "cuda"
    if arguments.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is when it is first used
    elif not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --dry does without")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it alone
    results: dict[str, Any] = {"check": check(device, arguments.dry), "rows": {}}
    print(f"check of the numbers: {results['check']}\nstatistics over an attention forward:", flush=True)
    for case in cases():
        if arguments.dry and case.tokens != 8192:
            continue
        row = time_row(case, device, arguments.dry)
        results["rows"][" | ".join(map(str, case))] = row
        print(describe(case, row), flush=True)
        save(results, arguments.dry)
    if not arguments.dry:
        results["memory"] = memory(device)
        print(f"memory beyond the inputs, 16384 x 16384: {results['memory'] / 2**20:.2f} MB")
    results["watched"] = watched_run(device, arguments.dry)
    same = "the same weights" if results["watched"]["same_weights"] else "OTHER WEIGHTS"
    print(f"a run watched at every=20 over an unwatched one: {measure.spread(results['watched']['ratios'])}, {same}")
    save(results, arguments.dry)


def save(results: dict[str, Any], dry: bool) -> None:
    if not dry:
        measure.write("attention_gpu", results)


if __name__ == "__main__":
    main()
