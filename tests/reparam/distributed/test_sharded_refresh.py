"""Moving the vectors of sharded weights: what is sent, and what becomes of weights that are zero or not finite."""

import math

import pytest
import torch
import torch.distributed as dist
from gloo_processes import Collectives, in_processes
from sharded_models import (
    Net,
    adamw,
    all_processes,
    assert_close,
    assert_equal_everywhere,
    data,
    message_of,
    net,
    shard_,
    share,
    train,
    whole,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import trimtab as tt
from trimtab.reparam import sigma_gamma, stable_ranks


def layers(count: int, width: int, vectors: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return sharded layers of width columns and width + 3 rows, in two blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width + 3, dtype=dtype) for _ in range(count)))
    tt.reparametrize_(model, tt.SigmaReparam(vectors=vectors, blocks=lambda layer, name: (5, width - 2)))
    for layer in model:
        fully_shard(layer, mesh=all_processes())
    return model


def sends_two_small_sums(rank: int) -> None:
    for count, width, vectors in ((2, 13, 1), (2, 13, 4), (20, 13, 4), (2, 130, 4)):
        model = layers(count, width, vectors)
        with Collectives() as sent:
            tt.refresh_(model)
        assert sent.names == ["allreduce", "allreduce"]
        assert sent.bytes == 4 * count * vectors * (2 * width + width + 3)
    with Collectives() as sent:
        model[0].weight.full_tensor()
    assert sent.names == ["all_gather_into_tensor"]  # so it would be seen if a weight were gathered


def sends_two_sums_for_each_dtype(rank: int) -> None:
    model = nn.Sequential(*layers(2, 13, 4), *layers(3, 14, 4, torch.float64))
    with Collectives() as sent:
        tt.refresh_(model)
    assert sent.names == 4 * ["allreduce"]
    assert sent.bytes == 4 * 2 * 4 * (2 * 13 + 16) + 8 * 3 * 4 * (2 * 14 + 17)


def an_optimisers_step_sends_no_more(rank: int) -> None:
    model = shard_(net())
    optimizer = adamw(model)
    train(model, share(data()), optimizer, steps=1)
    before = model.up.sigma_u.clone()
    with Collectives() as sent:
        optimizer.step()
    assert not torch.equal(model.up.sigma_u, before)
    assert sent.names == ["allreduce", "allreduce"]
    assert sent.bytes == 8 * 4 * numbers_of(model)


def numbers_of(model: Net, names: tuple[str, ...] = ("conv", "embed", "attention", "up", "down")) -> int:
    """Return blocks · columns + rows of the weights of some layers."""
    of_each = {"conv": 6 + 9, "embed": 9 + 10, "attention": 3 * 10 + 30 + 10 + 10, "up": 10 + 12, "down": 12 + 5}
    return sum(of_each[name] for name in names)


def sends_two_sums_in_each_group_of_processes(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = net()
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    shard_(model, mesh["data"])
    with Collectives() as sent:
        tt.refresh_(model)
    assert sent.names == 4 * ["allreduce"]
    assert sent.bytes == 8 * 4 * (numbers_of(model) + numbers_of(model, ("up", "down")))
    model = shard_(net(), mesh)  # replicas of pieces: only those who share a replica talk
    with Collectives() as sent:
        tt.refresh_(model)
    assert sent.names == 2 * ["allreduce"]
    assert sent.bytes == 8 * 4 * numbers_of(model)


def exact_vectors_come_from_the_pieces(rank: int) -> None:
    shapes = [(150, 140), (3, 40), (40, 3), (1, 7), (7, 1)]
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(3)
        model = nn.Sequential(*(nn.Linear(columns, rows, dtype=dtype) for rows, columns in shapes))
        tt.reparametrize_(model)
        weights = []
        with torch.no_grad():
            for layer in model:
                weights.append(layer.weight.normal_().clone())
                fully_shard(layer, mesh=all_processes())
        with Collectives() as sent:
            tt.refresh_(model, exact=True)
        assert all(size <= 150 * weights[0].itemsize for name, size in sent.calls if name == "allreduce")
        others = [size for name, size in sent.calls if name != "allreduce"]
        assert max(others) <= weights[0].itemsize  # every gamma is looked at: was it ever set?
        for layer, weight in zip(model, weights, strict=True):
            u, v = layer.sigma_u[0], layer.sigma_v
            identity = torch.eye(len(u), dtype=dtype)
            assert_close(u @ u.t(), identity, "u")
            assert_close(v @ weight @ u[0], torch.linalg.matrix_norm(weight, 2), "sigma")


def spoil_(weight: Tensor, value: float, row: int) -> None:
    """Write into the first column of one row, wherever it lies."""
    full = whole(weight.detach()).clone()
    full[row, 0] = value
    with torch.no_grad():
        weight.to_local().copy_(full.chunk(dist.get_world_size())[dist.get_rank()])


def vectors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "sigma" in name}


def a_weight_that_is_not_finite_keeps_its_vectors(rank: int) -> None:
    for value in (math.nan, math.inf):
        model = shard_(net())
        train(model, share(data()), steps=1)
        spoil_(model.up.weight, value, row=11)  # the last process's
        spoil_(model.attention.in_proj_weight, value, row=15)  # in the block of the keys
        before = vectors_of(model)
        refused = message_of(lambda model=model: tt.refresh_(model, exact=True))
        assert "attention.in_proj_weight cannot be refreshed" in refused
        assert "NaN or inf" in refused
        assert_equal_everywhere(refused)
        assert all(torch.equal(tensor, before[name]) for name, tensor in vectors_of(model).items())
        tt.refresh_(model)
        after = vectors_of(model)
        kept = [name for name in before if torch.equal(before[name], after[name])]
        assert kept == ["up.sigma_u", "up.sigma_v"]
        block = slice(10, 20)
        old, new = before["attention.in_proj_sigma_u"], after["attention.in_proj_sigma_u"]
        assert [torch.equal(a, b) for a, b in zip(old, new, strict=True)] == [False, True, False]
        assert torch.equal(after["attention.in_proj_sigma_v"][block], before["attention.in_proj_sigma_v"][block])
        assert all(tensor.isfinite().all() for tensor in after.values())


def a_zero_weight_has_no_exact_vectors(rank: int) -> None:
    model = shard_(net())
    with torch.no_grad():
        model.down.weight.to_local().zero_()
    assert_equal_everywhere(message_of(lambda: tt.refresh_(model, exact=True)))
    before = vectors_of(model)
    tt.refresh_(model)
    assert torch.equal(model.down.sigma_u, before["down.sigma_u"])


def a_zero_piece_is_no_zero_weight(rank: int) -> None:
    model, reference = shard_(net()), net()
    with torch.no_grad():
        reference.up.weight.tensor_split([9])[1].zero_()  # of 4 processes the last holds nothing else
        if rank == 3:
            model.up.weight.to_local().zero_()
    for each in (model, reference):
        tt.refresh_(each, exact=True)
    expected = sigma_gamma(reference)["up.weight"]
    assert_close(sigma_gamma(model)["up.weight"][0], expected[0], "sigma")
    assert_close(model.up.sigma_v.abs(), reference.up.sigma_v.abs(), "v")


def stable_ranks_are_those_of_the_whole(rank: int) -> None:
    models = shard_(net()), net()
    found, expected = (stable_ranks(each, {n: sigma for n, (sigma, _) in sigma_gamma(each).items()}) for each in models)
    assert found.keys() == expected.keys()
    assert any(len(ranks) > 1 for ranks in expected.values())  # a fused weight too
    for name, ranks in found.items():
        assert_close(ranks, expected[name], name)


def check(rank: int) -> None:
    stable_ranks_are_those_of_the_whole(rank)
    sends_two_small_sums(rank)
    an_optimisers_step_sends_no_more(rank)
    exact_vectors_come_from_the_pieces(rank)
    a_weight_that_is_not_finite_keeps_its_vectors(rank)
    a_zero_weight_has_no_exact_vectors(rank)
    if dist.get_world_size() == 4:
        a_zero_piece_is_no_zero_weight(rank)
        sends_two_sums_in_each_group_of_processes(rank)
    else:
        sends_two_sums_for_each_dtype(rank)


@pytest.mark.parametrize("count", [2, 4])
def test_sharded_refresh(count: int) -> None:
    in_processes(count, check)
