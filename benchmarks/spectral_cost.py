"""What sigma-Reparam costs: a training step, memory, the bytes kept for backward, inference once folded.

    python benchmarks/spectral_cost.py                    # stacks of MLP blocks on CPU: about 10 minutes on 2 cores
    python benchmarks/spectral_cost.py --device cuda      # ViT-B/16 and GPT-2 medium's blocks: at most --minutes (8)
    python benchmarks/spectral_cost.py --quick            # does it run? a minute, tiny models, no numbers worth keeping

A step is forward, backward and fused AdamW. Each arm takes steps in turn with the plain model; printed is the median
ratio over paired rounds, smallest and largest beside it. Arms: trimtab (its default, several vectors a weight), trimtab
with one vector, the published algorithm (published.py), and torch's parametrizations.spectral_norm on every Linear,
which has no gamma and so computes another function.

  CPU   blocks LayerNorm-Linear-GELU-Linear, 768 wide, 512 and 2048 tokens, float32, eager
  GPU   ViT-B/16 and 24 blocks of GPT-2 medium's size, 8k to 64k tokens, bfloat16 autocast, eager and with every block
        compiled

First the numbers are checked: training on the device against the CPU, and against the published algorithm. Peak memory
is that of the model and a few steps: on CPU the growth of the resident memory of a process of its own (VmHWM), on a GPU
torch.cuda.max_memory_allocated. Bytes kept for backward leave the parameters themselves out.

Writes results/spectral_cost_<device>.json after every row. The most telling rows come first; --resume keeps the rows
that are there, if they come from the same machine and versions, and does those that are missing.
"""

import argparse
import copy
import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import measure
import published
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt
from trimtab.spectral import spectral_norm

ARMS = ("trimtab", "trimtab, 1 vector", "published", "torch spectral_norm")
STEPS_FOR_MEMORY = 3


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (B, L, 3D) -> (3, B, H, L, E)
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return x + self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, heads, causal), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(x))


class ViT(nn.Module):
    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(197, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Subject(NamedTuple):
    """A model to measure on: how to make it, shape and tokens of one item of its input, bfloat16 autocast or not."""

    make: Callable[[], nn.Module]
    item: tuple[int, ...]
    tokens: int
    half: bool


def subjects(quick: bool) -> dict[str, Subject]:
    if quick:
        vit, gpt, width = (64, 2, 2), (64, 2, 2), 64
    else:
        vit, gpt, width = (768, 12, 12), (1024, 24, 16), 768
    return {
        "MLP blocks": Subject(lambda: nn.Sequential(*[MLP(width) for _ in range(4)]), (width,), 1, False),
        "ViT-B/16": Subject(lambda: ViT(*vit), (3, 224, 224), 197, True),
        "GPT-2 medium": Subject(
            lambda: nn.Sequential(*[Block(gpt[0], gpt[2], causal=True) for _ in range(gpt[1])]),
            (1024, gpt[0]),
            1024,
            True,
        ),
    }


class Case(NamedTuple):
    subject: str
    batch: int
    mode: str
    arm: str


def cases(device: str) -> Iterator[Case]:
    """What is to be measured, the most telling first."""
    if device == "cpu":
        for arm in ARMS:
            for tokens in (512, 2048):
                yield Case("MLP blocks", tokens, "eager", arm)
        return
    middle, others = {"ViT-B/16": 128, "GPT-2 medium": 25}, {"ViT-B/16": (325, 42), "GPT-2 medium": (64, 8)}
    for name in middle:
        for arm in ARMS:
            for mode in ("compiled", "eager"):
                yield Case(name, middle[name], mode, arm)
    for arm in ("trimtab", "published"):
        for name in others:
            for batch in others[name]:
                for mode in ("compiled", "eager"):
                    yield Case(name, batch, mode, arm)


def converted(plain: nn.Module, arm: str) -> nn.Module:
    model = copy.deepcopy(plain)
    if arm == "trimtab":
        return tt.reparametrize_(model)
    if arm == "trimtab, 1 vector":
        return tt.reparametrize_(model, tt.SigmaReparam(vectors=1))
    if arm == "published":
        return published.convert_(model, decompose=spectral_norm)  # the same vectors, in seconds
    if arm == "torch spectral_norm":
        for module in list(model.modules()):
            if type(module) is nn.Linear:
                nn.utils.parametrizations.spectral_norm(module)
        return model
    return model


class Bench:
    """Builds models and measures them, all on one device and of one scale."""

    def __init__(self, device: str, rounds: int, quick: bool) -> None:
        self.device, self.rounds, self.quick = device, rounds, quick
        self.subjects = subjects(quick)
        self.prepared = lru_cache(maxsize=1)(self._prepared)
        self.peak_in_child = lru_cache(self._peak_in_child)

    def row(self, case: Case) -> dict[str, Any]:
        """Measure one arm against the plain model."""
        plain, other = (copy.deepcopy(model) for model in self.prepared(case.subject, case.arm))
        x = self.input(case)
        row: dict[str, Any] = {"tokens": len(x) * self.subjects[case.subject].tokens}
        if case.mode == "compiled":
            torch.compiler.reset()
            for model in (plain, other):
                compile_blocks(model, whole_graph=case.arm != "torch spectral_norm")
        if case.arm != "torch spectral_norm":
            row["deviation"] = self.deviation(case, plain, other, x)
        if case.mode == "eager":
            row["saved"] = [self.saved_bytes(case, model, x) for model in (plain, other)]
        if self.device == "cpu":
            row["memory"] = [self.peak_in_child(case._replace(arm=arm)) for arm in ("plain", case.arm)]
        else:
            row["memory"] = [self.peak_on_gpu(case, model, x) for model in (plain, other)]
        steps = [self.training_step(case, model, x) for model in (plain, other)]
        repeat(steps[0], 2)
        seconds = measure.timed(steps[0], self.device)
        # On a GPU several steps a round, so that its queue of work is as full as it is in training.
        count = 1 if self.device == "cpu" else max(2, math.ceil(0.15 / seconds))
        first, second = (partial(repeat, step, count) for step in steps)
        row["step"] = measure.paired(first, second, self.rounds, self.device)
        row["plain_seconds"] = measure.timed(first, self.device) / count
        if case.arm == "trimtab" and case.mode == "eager":
            tt.fold_(other)
            with torch.no_grad():
                first, second = (partial(self.forward, case, model, x) for model in (plain, other))
                row["folded"] = measure.paired(first, second, self.rounds, self.device)
        return row

    def _prepared(self, subject: str, arm: str) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        with torch.device(self.device):
            plain = self.subjects[subject].make()
        return plain, converted(plain, arm)

    def input(self, case: Case) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        batch = max(2, case.batch // 32) if self.quick else case.batch
        return torch.randn(batch, *self.subjects[case.subject].item, generator=generator).to(self.device)

    def forward(self, case: Case, model: nn.Module, x: Tensor) -> Tensor:
        half = self.subjects[case.subject].half
        with torch.autocast(self.device, torch.bfloat16) if half else nullcontext():
            output: Tensor = model(x)
        return output

    def training_step(self, case: Case, model: nn.Module, x: Tensor) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            self.forward(case, model, x).float().square().mean().backward()
            optimizer.step()

        return step

    def deviation(self, case: Case, plain: nn.Module, other: nn.Module, x: Tensor) -> float:
        """How far the converted model's output lies from the plain one's, which it is to equal at the start."""
        wanted, got = (self.forward(case, model, x).detach().double() for model in (plain, other))
        relative = float((got - wanted).norm() / wanted.norm())
        allowed = 0.03 if self.subjects[case.subject].half else 1e-5  # some roundings to bfloat16, or to float32
        if not relative < allowed:
            raise ArithmeticError(f"outputs lie {relative:.2g} from the plain model's, more than {allowed}")
        return relative

    def saved_bytes(self, case: Case, model: nn.Module, x: Tensor) -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self.forward(case, model, x)
        del output
        return sum(storages.values())

    def peak_on_gpu(self, case: Case, model: nn.Module, x: Tensor) -> int:
        """Bytes of a model and of what its training steps need at their peak."""
        own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        self.training_step(case, model, x)()  # compiles, and has the libraries take what they keep
        model.zero_grad()
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        repeat(self.training_step(case, model, x), STEPS_FOR_MEMORY)
        model.zero_grad()
        return torch.cuda.max_memory_allocated() - before + own

    def _peak_in_child(self, case: Case) -> int:
        quick = ["--quick"] if self.quick else []
        # glibc then gives every freed tensor back at once: the memory held is the memory in use.
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
        return int(measure.in_child(__file__, "--peak", json.dumps(case), *quick, **environment))

    def peak_here(self, case: Case) -> int:
        """Bytes of a model and of what its training steps need at their peak, in a process that did nothing else."""
        x = self.input(case)
        # Libraries and their workspaces count as resident once they are used: use them all beforehand.
        one = converted(nn.Sequential(MLP(x.shape[-1])), case.arm)
        repeat(self.training_step(case, one, x), 2)
        del one
        before, _ = measure.resident_memory()
        plain, model = self._prepared(case.subject, case.arm)
        del plain
        repeat(self.training_step(case, model, x), STEPS_FOR_MEMORY)
        return measure.resident_memory()[1] - before


def repeat(step: Callable[[], None], count: int) -> None:
    for _ in range(count):
        step()


def compile_blocks(model: nn.Module, whole_graph: bool) -> None:
    import torch._dynamo  # seconds, which most processes here can do without

    # torch makes a class for every parametrized layer, so each block is compiled anew; and what was given up
    # silently would be measured as eager.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(fullgraph=whole_graph, dynamic=False)


def check(device: str) -> dict[str, Any]:
    """The numbers first: training here follows the CPU and the published algorithm, and folding changes nothing."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True), nn.Linear(64, 8)
    ).double()
    x = torch.randn(4, 10, 64, dtype=torch.float64)
    ends = {where: trained(tt.reparametrize_(copy.deepcopy(plain)).to(where), x.to(where)) for where in ("cpu", device)}
    torch.testing.assert_close(ends[device].cpu(), ends["cpu"], rtol=1e-6, atol=1e-8)
    plain = Block(64, 4, causal=True).double().to(device)
    ours = tt.reparametrize_(copy.deepcopy(plain), tt.SigmaReparam(vectors=1, blocks="one"))
    theirs = published.convert_(copy.deepcopy(plain))
    torch.testing.assert_close(trained(ours, x.to(device)), trained(theirs, x.to(device)), rtol=1e-6, atol=1e-8)
    before = ours(x.to(device))
    torch.testing.assert_close(tt.fold_(ours)(x.to(device)), before)
    return {"passed": f"20 float64 steps on {device} end where they do on cpu, and where the published algorithm's do"}


def trained(model: nn.Module, x: Tensor) -> Tensor:
    """Return a model's output after 20 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        output = model(x)
        (output.square().mean() + output.mean()).backward()
        optimizer.step()
    return model(x).detach()


def describe(case: Case, row: dict[str, Any]) -> str:
    tokens = f"{row['tokens']:6} tokens" if "tokens" in row else ""
    start = f"{case.subject:12} {tokens:13} {case.mode:8} {case.arm:19}"
    if "error" in row:
        return f"{start} failed: {row['error']}"
    ratios = {name: row[name][1] / row[name][0] for name in ("memory", "saved") if name in row}
    words = [f"step {measure.spread(row['step'])}", f"peak memory {ratios['memory']:.3f}"]
    words += [f"saved for backward {ratios['saved']:.3f}"] if "saved" in ratios else []
    words += [f"folded inference {measure.spread(row['folded'])}"] if "folded" in row else []
    return f"{start} {', '.join(words)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, help="default: 15 on CPU, 10 on a GPU")
    parser.add_argument(
        "--minutes", type=float, help="start no row after so many; default: 8 on a GPU, no limit on CPU"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there already")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, on_cpu = arguments.device, arguments.device == "cpu"
    bench = Bench(device, 2 if arguments.quick else arguments.rounds or (15 if on_cpu else 10), arguments.quick)
    if arguments.peak:
        print(bench.peak_here(Case(*json.loads(arguments.peak))))
        return
    if not on_cpu and not torch.cuda.is_available():
        parser.error("this torch sees no GPU")
    deadline = time.monotonic() + 60 * (arguments.minutes or (math.inf if on_cpu else 8))
    checked = attempt(bench, partial(check, device))
    print(f"check of the numbers: {checked}", flush=True)
    name = f"spectral_cost_{device}" + ("_quick" if arguments.quick else "")
    rows = measure.rows_so_far(name) if arguments.resume else {}
    print("each over the plain model: median of the paired rounds (smallest-largest)")
    for case in cases(device):
        key = " | ".join(map(str, case))
        if "error" in rows.get(key, {"error": ""}):
            if time.monotonic() > deadline:
                print(f"out of time: {key} and what comes after it are left for --resume")
                break
            rows[key] = attempt(bench, partial(bench.row, case))
            measure.write(name, {"check": checked, "rows": rows})
        print(describe(case, rows[key]), flush=True)
    print(measure.write(name, {"check": checked, "rows": rows}))


def attempt(bench: Bench, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do it, or say why not: on a machine nobody has tried, one failure is not to cost the other rows."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
