"""Distributed checkpoints, plain ones loaded into sharded converted models, and models that begin on meta."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo_processes import in_processes
from sharded_models import (
    Net,
    adamw,
    all_processes,
    assert_close,
    assert_equal_everywhere,
    assert_same,
    assert_same_sigmas,
    data,
    net,
    plain_net,
    shard_,
    share,
    tied_net,
    train,
    whole,
    words,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import trimtab as tt


def saves_half_way(rank: int, folder: str) -> None:
    model = shard_(net())
    optimizer = adamw(model)
    train(model, share(data()), optimizer, steps=10)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def loads_and_goes_on(rank: int, folder: str) -> None:
    model = shard_(tt.reparametrize_(plain_net(seed=7)))
    optimizer = adamw(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, share(data()), optimizer, steps=10)
    reference = net()
    train(reference, data())
    assert_same(model, reference)


def test_four_processes_save_and_two_load(tmp_path: Path) -> None:
    in_processes(4, saves_half_way, str(tmp_path))
    in_processes(2, loads_and_goes_on, str(tmp_path))


def a_plain_state_dict_gives_the_plain_function(rank: int) -> None:
    plain = plain_net(seed=7)
    x, _ = data()
    for from_rank0, config in ((False, tt.SigmaReparam("one")), (True, tt.SigmaReparam(vectors=1, blocks="heads"))):
        model = shard_(net(config=config))
        train(model, share(data()), steps=1)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank0)
        state = plain.state_dict() if rank == 0 or not from_rank0 else {}
        set_model_state_dict(model, state, options=options)
        torch.testing.assert_close(model(x), plain(x))


def a_whole_state_dict_of_ours_is_taken_as_it_is(rank: int) -> None:
    trained = net()
    train(trained, data(), steps=3)
    for from_rank0 in (False, True):
        model = shard_(tt.reparametrize_(plain_net(seed=7)))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank0)
        set_model_state_dict(model, trained.state_dict(), options=options)
        assert_same(model, trained)
        own = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert {name: tuple(tensor.shape) for name, tensor in own.items()} == {
            name: tuple(tensor.shape) for name, tensor in trained.state_dict().items()
        }
        before = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(model.state_dict(keep_vars=True))
        assert all(torch.equal(whole(tensor), before[name]) for name, tensor in model.state_dict().items())


def a_plain_state_dict_without_direction_is_refused(rank: int) -> None:
    state = plain_net().state_dict()
    state["up.weight"].zero_()
    with pytest.raises(RuntimeError, match=r"up.weight comes from a plain checkpoint.*zero") as refused:
        set_model_state_dict(shard_(net()), state, options=StateDictOptions(full_state_dict=True))
    assert_equal_everywhere(str(refused.value))


def on_meta(config: tt.SigmaReparam) -> Net:
    with torch.device("meta"):
        return shard_(tt.reparametrize_(Net().double(), config))


def assert_same_function(model: Net, reference: Net) -> None:
    assert_same_sigmas(model, reference)
    assert_close(model(data()[0]), reference(data()[0]), "output")
    model.reshard()  # or an optimiser made now would be given what a forward gathered


def from_meta_by_loading(rank: int) -> None:
    trained = net(config=tt.SigmaReparam("one"))
    train(trained, data(), steps=3)
    for source, reference in ((trained, trained), (plain_net(), net())):
        for empty_first in (False, True):
            model = on_meta(tt.SigmaReparam("one"))
            if empty_first:
                model.to_empty(device="cpu")
            state = {name: tensor.clone() for name, tensor in source.state_dict().items()} if rank == 0 else {}
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(model, state, options=options)
            assert_same_function(model, reference)
            train(model, share(data()), steps=1)  # all that a sharded model needs is there


def from_meta_by_own_values(rank: int) -> None:
    values = plain_net().state_dict()
    for config in (tt.SigmaReparam("one", blocks="heads"), tt.SigmaReparam(vectors=1)):
        model, reference = on_meta(config).to_empty(device="cpu"), net(config=config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in values:
                    p.copy_(distribute_tensor(values[name], p.device_mesh, p.placements))
        tt.refresh_(model, exact=True)
        assert_same_function(model, reference)
    train(model, share(data()), steps=5)  # of one vector there is no more to know than its direction
    train(reference, data(), steps=5)
    assert_same_sigmas(model, reference)
    for name, p in reference.named_parameters():
        assert_close(whole(model.get_parameter(name)), p, name)


def tied_weights_from_meta(rank: int) -> None:
    reference = tied_net()
    with torch.device("meta"):
        model = tied_net()
    fully_shard(model, mesh=all_processes())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gamma" not in name:
                p.copy_(distribute_tensor(reference.get_parameter(name).detach(), p.device_mesh, p.placements))
    tt.refresh_(model, exact=True)
    assert model.head.weight is model.embedding.weight
    assert model.head.gamma is model.embedding.gamma
    assert_same_sigmas(model, reference)
    train(model, share(words()), steps=5)
    train(reference, words(), steps=5)
    assert_same_sigmas(model, reference)
    assert torch.equal(model.head.sigma_u, model.embedding.sigma_u)


def from_meta_by_drawing(rank: int) -> None:
    config = tt.SigmaReparam(2.5)
    model, plain = on_meta(config).to_empty(device="cpu"), plain_net()
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    drawn = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    plain.load_state_dict({name: drawn[name] for name in plain.state_dict()})
    assert_same_function(model, tt.reparametrize_(plain, config))


def check(rank: int) -> None:
    a_plain_state_dict_gives_the_plain_function(rank)
    a_whole_state_dict_of_ours_is_taken_as_it_is(rank)
    from_meta_by_own_values(rank)
    if dist.get_world_size() == 2:
        a_plain_state_dict_without_direction_is_refused(rank)
        from_meta_by_loading(rank)
        from_meta_by_drawing(rank)
        tied_weights_from_meta(rank)


@pytest.mark.parametrize("count", [2, 4])
def test_sharded_loading(count: int) -> None:
    in_processes(count, check)
