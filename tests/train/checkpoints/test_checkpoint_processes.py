"""Checkpoints of several processes: they go on to the last bit, and load on any other number of them."""

import multiprocessing
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_processes import in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trimtab.errors import CheckpointError
from trimtab.reparam import reparametrize_
from trimtab.reparam.carried import is_sharded, whole
from trimtab.train.average import Average
from trimtab.train.checkpoints import checkpoint as checkpoints
from trimtab.train.checkpoints import load_checkpoint, load_weights, newest_checkpoint, save_checkpoint
from trimtab.train.state import TrainState

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and "forkserver" in multiprocessing.get_all_start_methods()),
    reason="needs gloo and a fork server",
)


class Run:
    """A converted model whose rows the processes share unevenly; each process draws its own data and dropout."""

    def __init__(self, strategy: str, seed: int = 0, width: int = 7) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(5, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 3)]
        model = reparametrize_(nn.Sequential(*layers))
        if strategy == "fsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.forward = DistributedDataParallel(model) if strategy == "ddp" else model
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        optimizers = [torch.optim.AdamW(matrices, lr=0.01), torch.optim.SGD(others, lr=0.01, momentum=0.9)]
        self.state = TrainState(model, optimizers, Average(model, 0.9))
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(100 + rank)
        random.seed(rank)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            loss = self.forward(torch.randn(6, 5) + random.random()).square().mean()
            for optimizer in self.state.optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.state.optimizers:
                optimizer.step()
            self.state.average.update_()
            self.state.step += 1

    def everything(self) -> dict[str, Tensor]:
        """Every tensor of the run, whole, by name."""
        state = self.state
        found = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
        found |= {f"average.{name}": tensor for name, tensor in state.average.state_dict().items()}
        for i, optimizer in enumerate(state.optimizers):
            for number, entries in optimizer.state_dict()["state"].items():
                found |= {
                    f"optimizer.{i}.{number}.{name}": entry for name, entry in entries.items() if entry is not None
                }
        return {name: whole(tensor).clone() for name, tensor in found.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def save_in_the_middle(rank: int, folder: str, strategy: str) -> None:
    run = Run(strategy)
    run.train(3)
    save_checkpoint(Path(folder), run.state, keep=1, best=False)
    saved = run.everything()
    run.train(3)
    numbers = [torch.rand(3), torch.tensor(random.random(), dtype=torch.float64)]
    whole_run = run.everything()
    if rank == 0:
        torch.save({"saved": saved, "end": whole_run}, Path(folder, "expected.pt"))
    torch.save(numbers, Path(folder, f"numbers-{rank}.pt"))


def go_on(rank: int, folder: str, strategy: str) -> None:
    run = Run(strategy, seed=1)
    load_checkpoint(newest_checkpoint(Path(folder)), run.state)
    expected = torch.load(Path(folder, "expected.pt"))
    assert_equal(run.everything(), expected["saved"])
    run.train(3)
    assert_equal(run.everything(), expected["end"])
    numbers = torch.load(Path(folder, f"numbers-{rank}.pt"))
    assert torch.equal(torch.rand(3), numbers[0])
    assert random.random() == numbers[1].item()


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_go_on_to_the_last_bit(tmp_path: Path, strategy: str) -> None:
    in_processes(2, save_in_the_middle, str(tmp_path), strategy)
    in_processes(2, go_on, str(tmp_path), strategy)


def load_elsewhere(rank: int, folder: str, strategy: str) -> None:
    run = Run(strategy, seed=1)
    load_checkpoint(newest_checkpoint(Path(folder)), run.state)
    assert run.state.step == 3
    assert_equal(run.everything(), torch.load(Path(folder, "expected.pt"))["saved"])
    sharded = [is_sharded(p) for p in run.state.model.parameters()]
    assert all(sharded) if strategy == "fsdp" else not any(sharded)
    # A process that is new has numbers of its own.
    drawn: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(drawn, (torch.rand(3).tolist(), random.random()))
    assert len({str(numbers) for numbers in drawn}) == dist.get_world_size()
    run.train(1)
    weights = Run(strategy, seed=2)
    load_weights(newest_checkpoint(Path(folder)), weights.state.model, weights.state.average)
    saved = torch.load(Path(folder, "expected.pt"))["saved"]
    for name, tensor in weights.everything().items():
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [((2, "fsdp"), (3, "fsdp")), ((2, "ddp"), (3, "fsdp")), ((3, "fsdp"), (2, "ddp"))],
    ids=["fsdp-2-to-3", "ddp-2-to-fsdp-3", "fsdp-3-to-ddp-2"],
)
def test_another_number_of_processes(tmp_path: Path, first: tuple[int, str], then: tuple[int, str]) -> None:
    in_processes(first[0], save_in_the_middle, str(tmp_path), first[1])
    in_processes(then[0], load_elsewhere, str(tmp_path), then[1])


def test_one_process_loads_what_two_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_processes(2, save_in_the_middle, str(tmp_path), "fsdp")
    run = Run("none", seed=1)
    load_checkpoint(newest_checkpoint(tmp_path), run.state)
    assert_equal(run.everything(), torch.load(tmp_path / "expected.pt")["saved"])
    run.train(1)
    (record,) = caplog.records
    assert "the checkpoint is of 2 processes and this run has 1" in record.message


def fail_together(rank: int, folder: str) -> None:
    """What goes wrong in one process is raised in all: none is left waiting for the others."""
    run = Run("fsdp")
    good = checkpoints.write_checkpoint

    def full(*_: Any) -> None:
        raise CheckpointError("no space")

    checkpoints.write_checkpoint = full
    with pytest.raises(CheckpointError, match="no space"):
        save_checkpoint(Path(folder), run.state, keep=1, best=False)
    checkpoints.write_checkpoint = good
    save_checkpoint(Path(folder), run.state, keep=1, best=False)
    path = newest_checkpoint(Path(folder))
    other = Run("fsdp", seed=1, width=8)
    before = other.everything()
    # As if one of two machines did not see the folder.
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(path if rank == 0 else path / "elsewhere", Run("fsdp").state)
    with pytest.raises(CheckpointError, match=r"another model: 0\.weight is \(7, 5\) float32 in the file and \(8, 5\)"):
        load_checkpoint(path, other.state)
    assert_equal(other.everything(), before)


def test_an_error_in_one_process_is_raised_in_all(tmp_path: Path) -> None:
    in_processes(2, fail_together, str(tmp_path))
