"""Two processes: who climbs along whose gradient, skips that all agree on, and shards."""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "reparam" / "distributed"))
from gloo_processes import in_processes
from sam_models import net
from sharded_models import assert_same, data, shard_, share
from sharded_models import net as converted_net

import trimtab as tt

possible = dist.is_available() and dist.is_gloo_available() and "forkserver" in multiprocessing.get_all_start_methods()
pytestmark = pytest.mark.skipif(not possible, reason="needs gloo and forkserver")

RHO, LR = 0.5, 0.3


def rows(part: int | None = None) -> Tensor:
    """The examples, (16, 5), or the half of them that a process has."""
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x if part is None else x.chunk(2)[part]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - 0.3 * x[:, :3]).square().mean()
    return loss


def take_steps(
    model: DistributedDataParallel, optimizer: tt.SAM, x: Tensor, closed: bool, local: bool, weight: float = 1.0
) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight * loss_of(model, x)
        loss.backward()
        return loss

    for _ in range(3):
        if closed:
            optimizer.step(closure)
            continue
        if local:
            with model.no_sync():
                closure()
        else:
            closure()
        optimizer.first_step()
        closure()
        optimizer.second_step()


def per_worker_by_hand(model: nn.Module) -> None:
    """Each half has a perturbation of its own; the step takes the mean of the gradients that they find."""
    parameters = list(model.parameters())
    for _ in range(3):
        found = []
        before = [p.detach().clone() for p in parameters]
        for part in range(2):
            gradients = torch.autograd.grad(loss_of(model, rows(part)), parameters)
            length = torch.stack([g.norm() for g in gradients]).norm()
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p += RHO * g / length
            found.append(torch.autograd.grad(loss_of(model, rows(part)), parameters))
            with torch.no_grad():
                for p, w in zip(parameters, before, strict=True):
                    p.copy_(w)
        with torch.no_grad():
            for p, g, h in zip(parameters, *found, strict=True):
                p -= LR * (g + h) / 2


def synchronised_by_hand(model: nn.Module) -> None:
    optimizer = tt.SAM(model.parameters(), torch.optim.SGD, RHO, lr=LR)
    for _ in range(3):
        for end in (optimizer.first_step, optimizer.second_step):
            loss_of(model, rows()).backward()
            end()
        optimizer.zero_grad()


def ddp(rank: int) -> None:
    references: dict[str, nn.Module] = {"synchronised": net(), "per-worker": net()}
    synchronised_by_hand(references["synchronised"])
    per_worker_by_hand(references["per-worker"])
    for perturbation, reference in references.items():
        for closed in (True, False):
            model = DistributedDataParallel(net())
            optimizer = tt.SAM(model.parameters(), torch.optim.SGD, RHO, model=model, perturbation=perturbation, lr=LR)
            take_steps(model, optimizer, rows(rank), closed, perturbation == "per-worker")
            torch.testing.assert_close(model.module.state_dict(), reference.state_dict(), rtol=1e-10, atol=1e-12)
    difference = torch.dist(references["synchronised"][0].weight, references["per-worker"][0].weight)
    assert difference > 1e-3  # the two are different things


def ddp_skips(rank: int) -> None:
    """What only one process finds; afterwards the weights are the same in both."""
    for perturbation in ("synchronised", "per-worker"):
        for closed in (True, False):
            model = DistributedDataParallel(net())
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer = tt.SAM(model.parameters(), torch.optim.SGD, RHO, model=model, perturbation=perturbation, lr=LR)
            broken = rows(rank).clone()
            broken[0, 0] = torch.nan if rank == 1 else broken[0, 0]
            take_steps(model, optimizer, broken, closed, perturbation == "per-worker")
            assert optimizer.skipped_steps == 3
            for name, p in model.named_parameters():
                assert torch.equal(p, before[name])
            # a process whose own gradient is zero does not climb, and takes the step with the others
            take_steps(model, optimizer, rows(rank), closed, perturbation == "per-worker", weight=1.0 - rank)
            assert optimizer.skipped_steps == 3
            for name, p in model.named_parameters():
                everyone = [torch.empty_like(p) for _ in range(2)]
                dist.all_gather(everyone, p.detach())
                assert torch.equal(*everyone)
                assert not torch.equal(p, before[name])
    with pytest.raises(RuntimeError, match="needs the DistributedDataParallel model"):
        tt.SAM(net().parameters(), torch.optim.SGD, perturbation="per-worker", lr=LR).step(lambda: None)


def fsdp2(rank: int) -> None:
    for kind in (tt.SAM, tt.ASAM):
        reference, model = converted_net(), shard_(converted_net())
        optimizers = []
        for each, batch in ((reference, data()), (model, share(data()))):
            optimizer = kind(each.parameters(), torch.optim.AdamW, RHO, lr=0.02)
            sharded_steps(each, optimizer, batch, 4)
            optimizers.append(optimizer)
        assert_same(model, reference)  # weights, gammas, vectors and sigmas
        saved = get_optimizer_state_dict(model, optimizers[1].base_optimizer)
        resumed = kind(model.parameters(), torch.optim.AdamW, rho=9.0, lr=9.0)
        set_optimizer_state_dict(model, resumed.base_optimizer, saved)
        assert resumed.param_groups[0]["rho"] == RHO
        sharded_steps(model, resumed, share(data()), 2)
        sharded_steps(reference, optimizers[0], data(), 2)
        assert_same(model, reference)
        x, y = share(data())
        broken = (x * torch.nan if rank == 1 else x, y)
        sharded_steps(model, resumed, broken, 1)
        assert resumed.skipped_steps == 1
        assert_same(model, reference)
    with pytest.raises(ValueError, match="some parameters are sharded"):
        tt.SAM(model.parameters(), torch.optim.SGD, perturbation="per-worker", lr=LR)


def sharded_steps(model: nn.Module, optimizer: tt.SAM, batch: tuple[Tensor, Tensor], steps: int) -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = (model(batch[0]) - batch[1]).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def check(rank: int) -> None:
    ddp(rank)
    ddp_skips(rank)
    fsdp2(rank)


def test_two_processes() -> None:
    in_processes(2, check)
