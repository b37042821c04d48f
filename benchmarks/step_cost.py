"""What sigma-Reparam costs: a training step, the bytes kept for backward, and inference once folded.

    python benchmarks/step_cost.py                    # on CPU: a minute or two
    python benchmarks/step_cost.py --device cuda      # on a GPU, bfloat16 autocast; checks the numbers there first

Plain and converted stacks of 768-wide MLP blocks take steps in turn; printed is the median ratio over paired rounds.
Writes results/step_cost_<device>.json.
"""

import argparse
import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import measure
import torch
from torch import Tensor, nn

import trimtab as tt


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def stacks(device: str, blocks: int, width: int = 768) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Sequential(*[Block(width) for _ in range(blocks)]).to(device)
    return plain, tt.reparametrize_(copy.deepcopy(plain))


def training_step(model: nn.Module, x: Tensor, device: str) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()

    def step() -> None:
        with autocast:
            loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(storages.values())


def check(device: str) -> None:
    """The numbers first: conversion leaves the function, training follows the float64 CPU run, folding leaves it."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).double()
    runs = {}
    for where in ("cpu", device):
        model = tt.reparametrize_(copy.deepcopy(plain)).to(where)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x = torch.randn(4, 10, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(where)
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(x).square().mean() + model(x).mean()
            loss.backward()
            optimizer.step()
        before = model(x)
        torch.testing.assert_close(tt.fold_(model)(x), before)
        runs[where] = before.detach().cpu()
    torch.testing.assert_close(runs[device], runs["cpu"], rtol=1e-6, atol=1e-8)
    print(f"20 float64 steps on {device} equal those on cpu; folding left the function as it was")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = arguments.device
    if device != "cpu":
        check(device)
    rows: list[dict[str, Any]] = []
    for tokens, blocks in ((512, 4), (2048, 4)) if device == "cpu" else ((2048, 12), (8192, 12), (32768, 12)):
        plain, converted = stacks(device, blocks)
        x = torch.randn(tokens, 768, device=device)
        step = measure.paired(
            training_step(plain, x, device), training_step(converted, x, device), arguments.rounds, device
        )
        kept = saved_bytes(converted, x) / saved_bytes(plain, x)
        tt.fold_(converted)
        with torch.no_grad():
            folded = measure.paired(partial(plain, x), partial(converted, x), arguments.rounds, device)
        rows.append({"tokens": tokens, "step": step, "saved": kept, "folded": folded})
        print(
            f"{tokens:6} tokens: step {measure.spread(step)} x plain, saved for backward {kept:.3f} x plain, "
            f"folded inference {measure.spread(folded)} x plain",
            flush=True,
        )
    print(measure.write(f"step_cost_{device}", {"rows": rows}))


if __name__ == "__main__":
    main()
