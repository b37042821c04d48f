"""ColwiseParallel and RowwiseParallel, alone and under fully_shard, against one process."""

import pytest
import torch
import torch.distributed as dist
from gloo_processes import Collectives, in_processes
from sharded_models import (
    Net,
    all_processes,
    assert_same,
    data,
    net,
    plain_net,
    shard_,
    share,
    train,
    words,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import trimtab as tt


def split_(model: Net, mesh: DeviceMesh) -> Net:
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def trains_like_one_process(rank: int) -> None:
    count = dist.get_world_size()
    for dtype in (torch.float32, torch.float64)[: 2 if count == 2 else 1]:
        reference, model = net(dtype), split_(net(dtype), all_processes())
        assert model.up.weight.to_local().shape == (12 // count, 10)
        assert model.down.weight.to_local().shape == (5, 12 // count)
        train(reference, data(dtype))
        train(model, data(dtype))
        assert_same(model, reference)


class Fused(nn.Module):
    """Weights of several blocks, which the processes' pieces cut across."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.inner, self.uneven = nn.Linear(10, 24), nn.Linear(8, 9), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.even(x).chunk(3, -1)
        return self.uneven(self.inner(torch.tanh(q) * torch.sigmoid(k) + v))


def fused_weights_train_like_one_process(rank: int, vectors: int) -> None:
    blocks = {"even": (8, 8, 8), "inner": (2, 3, 4), "uneven": (2, 3, 4)}
    config = tt.SigmaReparam("one", vectors=vectors, blocks=lambda layer, name: blocks[name])
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(tt.reparametrize_(Fused().double(), config))
    reference, model = models
    by_rows = ColwiseParallel(output_layouts=Replicate())
    by_columns = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, all_processes(), {"even": by_rows, "inner": by_rows, "uneven": by_columns})
    assert [len(layer.gamma) for layer in (model.even, model.inner, model.uneven)] == [3, 3, 3]
    generator = torch.Generator().manual_seed(1)
    batch = [torch.randn(6, width, generator=generator, dtype=torch.float64) for width in (10, 9)]
    train(reference, (batch[0], batch[1]), steps=5)
    train(model, (batch[0], batch[1]), steps=5)
    assert_same(model, reference)


class Lookup(nn.Module):
    """An embedding of its own beside a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(14, 6), nn.Linear(6, 13)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words))


def embeddings_train_like_one_process(rank: int) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(tt.reparametrize_(Lookup().double(), tt.SigmaReparam("one", embeddings=True)))
    reference, model = models
    split = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize_module(model, all_processes(), {"embedding": split})
    train(reference, words(), steps=5)
    train(model, words(), steps=5)
    assert_same(model, reference)


def sends_one_number_per_sigma(rank: int) -> None:
    """Beside what plain layers send, forward and backward send one sigma, and one gradient of gamma, for each layer."""
    x, _ = data()
    sent = []
    for model in (plain_net(), tt.reparametrize_(plain_net())):
        split_(model, all_processes())
        for rows in (1, 8):  # fewer than the weight has, and more: the scale goes onto one thing or another
            for _ in range(2):  # the first time, torch works out how to split
                with Collectives() as forward:
                    loss = model(x[:rows]).square().mean()
                with Collectives() as backward:
                    loss.backward()
            sent.append([sorted(forward.calls), sorted(backward.calls)])
    plain, ours = sent[:2], sent[2:]
    two_sigmas = [("all_reduce", 8), ("all_reduce", 8)]
    assert ours == [[two_sigmas + calls for calls in passes] for passes in plain]


def makes_nothing_larger_than_a_piece(rank: int) -> None:
    config = tt.SigmaReparam(blocks=lambda layer, name: (24, 40))
    for style in (ColwiseParallel(), RowwiseParallel()):
        model = tt.reparametrize_(nn.Sequential(nn.Linear(64, 64)), config)
        parallelize_module(model, all_processes(), {"0": style})
        x = torch.ones(4, 64 if isinstance(style, ColwiseParallel) else 64 // dist.get_world_size())
        for _ in range(2):  # the first time, torch works out how to split, on tensors without memory
            model.zero_grad()
            with Collectives() as made:
                model(x).square().mean().backward()
                tt.refresh_(model)
        assert made.largest == 64 * 64 // dist.get_world_size()


def under_fully_shard_trains_like_one_process(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for dtype, vectors, steps in ((torch.float32, 4, 20), (torch.float64, 1, 5)):
        config = tt.SigmaReparam(vectors=vectors)
        reference, model = net(dtype, config), net(dtype, config)
        train(reference, data(dtype), steps=steps)
        shard_(split_(model, mesh["tensor"]), mesh["data"])
        assert model.up.weight.to_local().shape == (3, 10)
        assert model.down.weight.to_local().numel() in (3 * 6, 2 * 6)
        train(model, share(data(dtype), mesh["data"].get_local_rank(), 2), steps=steps)
        assert_same(model, reference)


def check(rank: int) -> None:
    trains_like_one_process(rank)
    if dist.get_world_size() == 2:
        fused_weights_train_like_one_process(rank, vectors=4)
        embeddings_train_like_one_process(rank)
        sends_one_number_per_sigma(rank)
        makes_nothing_larger_than_a_piece(rank)
    else:
        fused_weights_train_like_one_process(rank, vectors=1)
        under_fully_shard_trains_like_one_process(rank)


@pytest.mark.parametrize("count", [2, 4])
def test_tensor_parallel(count: int) -> None:
    in_processes(count, check)
