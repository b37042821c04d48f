"""DistributedDataParallel, against one process."""

import pytest
import torch
import torch.distributed as dist
from gloo_processes import Collectives, in_processes
from sharded_models import adamw, assert_same, data, net, share, train
from torch.nn.parallel import DistributedDataParallel

import trimtab as tt


def trains_like_one_process(rank: int) -> None:
    cases = [(torch.float32, tt.SigmaReparam("one", blocks="heads")), (torch.float64, tt.SigmaReparam(vectors=1))]
    for dtype, config in cases[: 2 if dist.get_world_size() == 2 else 1]:
        reference, model = net(dtype, config), net(dtype, config)
        train(reference, data(dtype))
        wrapped = DistributedDataParallel(model)
        train(wrapped, share(data(dtype)))
        assert_same(model, reference)


def refreshes_without_a_word(rank: int) -> None:
    model = DistributedDataParallel(net())
    optimizer = adamw(model)
    with Collectives() as sent:
        train(model, share(data()), optimizer, steps=1)
    assert sent.calls  # gradients travel
    with Collectives() as sent:
        before = model.module.up.sigma_u.clone()
        optimizer.step()
        tt.refresh_(model)
        tt.refresh_(model, exact=True)
    assert not torch.equal(model.module.up.sigma_u, before)
    assert not sent.calls


def check(rank: int) -> None:
    trains_like_one_process(rank)
    refreshes_without_a_word(rank)


@pytest.mark.parametrize("count", [2, 4])
def test_data_parallel(count: int) -> None:
    in_processes(count, check)
