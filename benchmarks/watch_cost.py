"""What watching costs: whole training runs, watched and unwatched in turn, and whether their weights end bit-identical.

    python benchmarks/watch_cost.py            # about a quarter of an hour on 2 cores
    python benchmarks/watch_cost.py --resume   # only the rows that are missing
    python benchmarks/watch_cost.py --quick    # does it run? half a minute, no numbers worth keeping

A run is its steps (forward, backward, fused AdamW) and nothing else, on data made before, with denormals flushed to
zero; the watched one opens its Watch, logs with the default signals, and closes it. Both start from the same weights.
Printed is the median of the paired ratios watched / unwatched, smallest and largest beside it, for

  ViT    the digits ViT of `trimtab train vit-digits`: 0.2 million parameters, batch 64, 17 tokens
  GPT    4 blocks, 256 wide, 4 heads, 8 texts of 128 tokens: 3.5 million parameters

each eager at every=20 and every=1, plain and with sigma-Reparam, and the GPT with compiled blocks. With every=1 each of
the run's steps is logged, so a shorter run will do. Writes results/watch_cost.json.
"""

import argparse
import copy
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt
from trimtab.models.vit import ViT
from trimtab.tasks.images.recipes import vit_digits


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (B, L, 3D) -> (3, B, H, L, E)
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Subject(NamedTuple):
    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]


def subject(name: str, quick: bool) -> Subject:
    torch.manual_seed(0)
    if name == "ViT":
        images = [torch.randn(64, 1, 8, 8) for _ in range(8)]
        return Subject(ViT(vit_digits().model), [(x, torch.randint(10, (64,))) for x in images])
    context, width = (32, 64) if quick else (128, 256)
    texts = [torch.randint(512, (8, context + 1)) for _ in range(8)]
    return Subject(GPT(512, context, width, 4, 4), [(x[:, :-1], x[:, 1:]) for x in texts])


class Case(NamedTuple):
    subject: str
    every: int
    steps: int
    sigma: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        kind = (", sigma" if self.sigma else "") + (", compiled" if self.compiled else "")
        return f"{self.subject}, every={self.every}{kind}"


CASES = [  # the most telling first
    Case("GPT", 20, 80),
    Case("GPT", 1, 40),
    Case("ViT", 20, 200),
    Case("ViT", 1, 60),
    Case("ViT", 20, 200, sigma=True),
    Case("ViT", 1, 60, sigma=True),
    Case("GPT", 1, 40, sigma=True),
    Case("GPT", 20, 80, compiled=True),
    Case("GPT", 20, 80, sigma=True),
]


def run(case: Case, start: Subject, folder: Path | None) -> nn.Module:
    """Train a copy of the start; watched into a folder, or not."""
    model = copy.deepcopy(start.model)
    if case.compiled:
        for block in model.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    batches = itertools.islice(itertools.cycle(start.batches), case.steps)

    def train(after: Callable[[Tensor], object]) -> None:
        for x, y in batches:
            loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after(loss)

    if folder is None:
        train(lambda loss: None)
        return model
    shutil.rmtree(folder, ignore_errors=True)
    with tt.Watch(model, folder, every=case.every, on_alarm=lambda alarm: None) as watch:
        train(watch.step)
    return model


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true", help="keep the rows that this machine has measured")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    rows = measure.rows_so_far("watch_cost") if arguments.resume else {}
    print(f"{'':4} {'every':>5} {'steps':>5} {'weights':8} {'mode':9} {'same weights':12}  watched / unwatched")
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if case.label in rows:
                continue
            if arguments.quick:
                case = case._replace(steps=math.ceil(case.steps / 20))
            start = subject(case.subject, arguments.quick)
            if case.sigma:
                tt.reparametrize_(start.model)
            unwatched, watched = (partial(run, case, start, each) for each in (None, Path(folder) / "run"))
            few = case._replace(steps=min(case.steps, 2 * case.every))
            same = same_weights(run(few, start, None), run(few, start, Path(folder) / "run"))
            ratios = measure.paired(unwatched, watched, 1 if arguments.quick else arguments.rounds, "cpu")
            rows[case.label] = {"steps": case.steps, "same_weights": same, "ratios": ratios}
            weights, mode = ("sigma" if case.sigma else "plain"), ("compiled" if case.compiled else "eager")
            print(
                f"{case.subject:4} {case.every:5} {case.steps:5} {weights:8} {mode:9} {'yes' if same else 'NO':12}  "
                f"{measure.spread(ratios)}",
                flush=True,
            )
            if not arguments.quick:
                measure.write("watch_cost", {"rows": rows})


if __name__ == "__main__":
    main()
