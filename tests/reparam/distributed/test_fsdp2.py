"""fully_shard, against one process."""

import pytest
import torch
import torch.distributed as dist
from gloo_processes import in_processes
from sharded_models import (
    all_processes,
    assert_close,
    assert_equal_everywhere,
    assert_same,
    assert_same_sigmas,
    data,
    message_of,
    net,
    plain_net,
    shard_,
    share,
    tied_net,
    train,
    words,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard

import trimtab as tt

OFFLOAD = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
CASES = {
    2: [
        (torch.float64, tt.SigmaReparam("one", blocks="heads"), {}),
        (torch.float32, tt.SigmaReparam(), {}),
        (torch.float64, tt.SigmaReparam(vectors=1), OFFLOAD),
    ],
    4: [(torch.float32, tt.SigmaReparam("one"), {}), (torch.float32, tt.SigmaReparam(vectors=1), OFFLOAD)],
}


def trains_like_one_process(rank: int) -> None:
    for dtype, config, options in CASES[dist.get_world_size()]:
        reference, model = net(dtype, config), net(dtype, config)
        train(reference, data(dtype))
        shard_(model, **options)
        assert all(p.to_local().numel() < p.numel() for p in model.parameters() if p.ndim > 1)
        train(model, share(data(dtype)))
        assert_same(model, reference)


def tied_weights_train_like_one_process(rank: int) -> None:
    reference, model = tied_net(), tied_net()
    train(reference, words(), steps=5)
    fully_shard(model, mesh=all_processes())
    train(model, share(words()), steps=5)
    assert_same(model, reference)
    assert model.head.gamma is model.embedding.gamma


def hybrid_sharding_trains_like_one_process(rank: int) -> None:
    reference, model = net(), net()
    train(reference, data(), steps=5)
    shard_(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "pieces")))
    train(model, share(data()), steps=5)
    assert_same(model, reference)


def a_sharded_model_can_be_looked_at(rank: int) -> None:
    reference, model = net(), shard_(net())
    x, _ = data()
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))  # some modules are left unsharded by this
    assert_same_sigmas(model, reference)
    for name, error in tt.sigma_error(model).items():
        assert_close(error, torch.zeros_like(error), name)
    assert tt.describe(model).replace("FSDP", "").split() == tt.describe(reference).split()


def folding_and_converting_are_refused(rank: int) -> None:
    model = shard_(net())
    with torch.no_grad():
        model(data()[0])
    assert_equal_everywhere(message_of(lambda: tt.fold_(model)))
    model.reshard()
    folding = message_of(lambda: tt.fold_(model))
    assert "conv.weight is sharded" in folding
    assert_equal_everywhere(folding)
    converting = message_of(lambda: tt.reparametrize_(shard_(plain_net())))
    assert "convert (or load) first, then shard" in converting
    assert_equal_everywhere(converting)


def the_first_version_is_refused(rank: int) -> None:
    for options in ({}, {"use_orig_params": True}):
        model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), **options)
        refused = message_of(lambda model=model: train(model, share(data()), steps=1))
        assert "fully_shard" in refused
        assert_equal_everywhere(refused)


def check(rank: int) -> None:
    trains_like_one_process(rank)
    tied_weights_train_like_one_process(rank)
    a_sharded_model_can_be_looked_at(rank)
    folding_and_converting_are_refused(rank)
    if dist.get_world_size() == 4:
        hybrid_sharding_trains_like_one_process(rank)
    else:
        the_first_version_is_refused(rank)


@pytest.mark.parametrize("count", [2, 4])
def test_fully_shard(count: int) -> None:
    in_processes(count, check)
