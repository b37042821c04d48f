"""Of sharded and replicated models every process is told the same, and what one process alone would find."""

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "reparam" / "distributed"))
from gloo_processes import in_processes

from trimtab.spectral.norms import norms, sums
from trimtab.watch.signals.embeddings import embedding_variability
from trimtab.watch.signals.gradients import gradient_moments, gradient_norm
from trimtab.watch.signals.sigmas import SigmaTracker
from trimtab.watch.signals.weights import plain_weights
from trimtab.watch.taps.gradients import GradientTap, noise_of
from trimtab.watch.taps.optimizer import OptimizerTap

possible = dist.is_available() and dist.is_gloo_available() and "forkserver" in multiprocessing.get_all_start_methods()
pytestmark = pytest.mark.skipif(not possible, reason="needs gloo and forkserver")


class Net(nn.Module):
    """Rows that two processes share unevenly, a convolution, and more than one stack of shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(13, 6), nn.Conv1d(6, 7, 2)
        self.one, self.two = nn.Linear(7, 7), nn.Linear(7, 5)

    def forward(self, tokens):
        x = self.conv(self.words(tokens).transpose(1, 2)).transpose(1, 2)
        return self.two(torch.tanh(self.one(x))).square().mean()


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(seed: int) -> torch.Tensor:
    return torch.randint(13, (4, 5), generator=torch.Generator().manual_seed(seed))


def watched_run(model: nn.Module, rank: int, count: int) -> list:
    """Three steps on this process's share of each batch, and all that is measured of them."""
    optimizer, tracker, tap = torch.optim.SGD(model.parameters(), lr=0.5), SigmaTracker(), OptimizerTap(model, always)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step).chunk(count)[rank]).backward()
        found.append({"gradient": gradient_norm(gradient_moments(dict(model.named_parameters())))})
        optimizer.step()
        reading = tap.take()
        found.append({"tap": reading.grad_norm} | reading.update_ratio)
        found.append(reading.grad_variance)
        weights = tracker.read(plain_weights(model), exact=step == 2)
        found += [{name: values[0] for name, values in weights.sigma.items()}, weights.stable_rank]
        found.append(embedding_variability(model)["words"]._asdict())
    tap.close()
    return found


def always() -> bool:
    return True


def sharded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    expected = watched_run(net(), 0, 1)
    model = net()
    for layer in (model.one, model):
        fully_shard(layer)
    found = watched_run(model, rank, 2)
    assert len(found) == len(expected) == 18
    for own, reference in zip(found, expected, strict=True):
        # One iteration of vectors that a Lanczos of pieces found agrees with that of an SVD to its tolerance.
        assert own == pytest.approx(reference, rel=1e-5)
    everyones: list = [None, None]
    dist.all_gather_object(everyones, found)
    assert everyones[0] == everyones[1]
    model = net()
    fully_shard(model.one)  # the others stay whole; both processes see all of each batch
    for own, reference in zip(watched_run(model, 0, 1), expected, strict=True):
        assert own == pytest.approx(reference, rel=1e-5)


def partial_sums(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    mesh = init_device_mesh("cpu", (2,))
    half = DTensor.from_local(torch.tensor([3.0, 4.0]) / 2, mesh, [Partial()], run_check=False)
    assert norms([half, torch.tensor([2.0])]).tolist() == pytest.approx([5.0, 2.0])
    assert sums([half, torch.tensor([2.0])]).tolist() == pytest.approx([7.0, 2.0])


def data_parallel(rank: int, micro_batches: int) -> None:
    """Against the sample variance of all processes' parts; local gradients are seen before they are averaged."""
    model = net()
    parts = [batch(10 * process + part) for process in range(2) for part in range(micro_batches)]
    each = []
    for tokens in parts:
        gradients = torch.autograd.grad(model(tokens), list(model.parameters()))
        each.append(torch.cat([gradient.flatten() for gradient in gradients]))
    wrapped = nn.parallel.DistributedDataParallel(model)
    tap = GradientTap(model, always)
    for _ in range(2):
        wrapped.zero_grad()
        for number, tokens in enumerate(parts[rank * micro_batches :][:micro_batches]):
            wrapped.require_backward_grad_sync = number == micro_batches - 1
            (wrapped(tokens) / micro_batches).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        own = tap.take()
    everyones: list = [None, None]
    dist.all_gather_object(everyones, own)
    tap.close()
    assert noise_of(everyones).variance == pytest.approx(torch.stack(each).var(0).sum().item(), rel=1e-6)


def everything(rank: int) -> None:
    sharded(rank)
    partial_sums(rank)
    data_parallel(rank, 1)
    data_parallel(rank, 3)


def test_two_processes() -> None:
    in_processes(2, everything)
