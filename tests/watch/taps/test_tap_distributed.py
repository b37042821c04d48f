"""Models wrapped for several processes (here one): the same names, and bit-identical training."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trimtab.watch.taps import AttentionTap

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch"),  # torch.compile's own, and these two
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.distributed"),
]


@pytest.fixture(autouse=True, scope="module")
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(16, 48), nn.Linear(16, 16), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))


def sharded(model: nn.Module) -> nn.Module:
    for block in model:
        fully_shard(block)
    return fully_shard(model)


def sharded_blocks_compiled(model: nn.Module) -> nn.Module:
    for block in model:
        block.compile(backend="eager")
    return sharded(model)


WRAPPED = {
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "FSDP2": sharded,
    "compiled FSDP2": lambda model: torch.compile(sharded(model), backend="eager"),
    "FSDP2 of compiled blocks": sharded_blocks_compiled,
}


@pytest.mark.parametrize(
    ("wrap", "watched"),
    [
        ("DDP", "wrapper"),
        ("compiled DDP", "model"),
        ("FSDP2", "model"),
        ("compiled FSDP2", "wrapper"),
        ("FSDP2 of compiled blocks", "wrapper"),
    ],
)
def test_seen_under_one_name_and_bit_identical(wrap, watched) -> None:
    def train(watched: str | None) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block())
        called = WRAPPED[wrap](model)
        wanted = watched is not None
        tap = AttentionTap({"wrapper": called, "model": model, None: nn.Identity()}[watched], lambda: wanted)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(2):
            called(torch.randn(4, 6, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert list(tap.take()) == (["0", "1"] if wanted else [])
            wanted = False
        tap.close()
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.state_dict().values()]
        return [*whole, torch.rand(2)]

    assert all(map(torch.equal, train(watched), train(None)))
