"""Two gloo processes, FSDP2 and tensor parallel, against one process."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import sigma_gamma

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")

STEPS = 5


class Net(nn.Module):
    """Rows that two processes share unevenly, a convolution, packed attention, and a two-layer MLP to split."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 9, 2)
        self.embed = nn.Linear(9, 10)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.up, self.down = nn.Linear(10, 14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.conv(x).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return tt.reparametrize_(Net().to(dtype), tt.SigmaReparam("one"))


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(8, 5, 5, generator=generator, dtype=torch.float64).to(dtype)


def train(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), reference.state_dict().items(), strict=True):
        torch.testing.assert_close(whole(ours), theirs, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def fsdp2(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    reference, model = net(torch.float64), net(torch.float64)
    x, y = data(torch.float64)
    expected = train(reference, x, y)
    for part in (model.attention, model.up, model.down):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert sum(p.to_local().numel() for p in model.parameters()) < sum(p.numel() for p in reference.parameters())
    own = slice(4 * rank, 4 * rank + 4)  # each process its half of the batch
    train(model, x[own], y[own])
    assert_same(model, reference)
    with torch.no_grad():
        loss = (model(x) - y).square().mean()
    assert loss < expected[0]
    with pytest.raises(tt.ConversionError, match="is sharded"):
        tt.fold_(model)
    model.reshard()
    with pytest.raises(tt.ConversionError, match="is sharded"):
        tt.fold_(model)
    for name, (sigma, gamma) in sigma_gamma(model).items():  # so that a sharded model can be watched and described
        torch.testing.assert_close((sigma, gamma), sigma_gamma(reference)[name], rtol=1e-9, atol=1e-9)
    assert "converted" in tt.describe(model)


def tensor_parallel(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    reference, model = net(torch.float64), net(torch.float64)
    x, y = data(torch.float64)
    expected = train(reference, x, y)
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    assert model.up.weight.to_local().shape == (7, 10)
    assert model.down.weight.to_local().shape == (5, 7)
    losses = train(model, x, y)
    assert losses == pytest.approx(expected, rel=1e-10)
    assert_same(model, reference)


def conversion_of_sharded_weights_is_refused(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(tt.ConversionError, match=r"convert \(or load\) first, then shard"):
        tt.reparametrize_(model)


def _run(rank: int, check: Callable[[int], None], port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
    try:
        check(rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("check", [fsdp2, tensor_parallel, conversion_of_sharded_weights_is_refused])
def test_two_processes_equal_one(check: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    # The processes start afresh and import this file by name.
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import test_sharded as by_name

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(by_name._run, (getattr(by_name, check.__name__), port), nprocs=2)
