"""What SAM keeps: saved, resumed to the bit, copied, scheduled, grown; and in the hands of other libraries."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from sam_models import closure_of, loss_of, net
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import trimtab as tt

BASES: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "fused": lambda p, **options: torch.optim.AdamW(p, fused=True, **options),
    "momentum": lambda p, **options: torch.optim.SGD(p, momentum=0.9, **options),
}


def trained(kind: Any, base: Any, steps: int) -> tuple[nn.Module, tt.SAM]:
    model = net(torch.float32)
    groups = [{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}]
    optimizer = kind(groups, base, 0.1, lr=0.02)
    for seed in range(steps):
        optimizer.step(closure_of(optimizer, model, seed))
    return model, optimizer


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("kind", [tt.SAM, tt.ASAM])
def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(kind: Any, base: Any) -> None:
    whole, _ = trained(kind, base, 7)
    model, optimizer = trained(kind, base, 4)
    with torch.no_grad():
        optimizer.zero_grad()
        optimizer.first_step()  # without gradients: skipped, and counted
        optimizer.second_step()
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    fresh, resumed = trained(kind, base, 0)
    resumed.param_groups[0]["rho"] = 9.0
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["rho"] == 0.3
    assert resumed.skipped_steps == 1
    for seed in range(4, 7):
        resumed.step(closure_of(resumed, fresh, seed))
    torch.testing.assert_close(fresh.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert resumed.state is resumed.base_optimizer.state


def test_the_state_of_the_plain_optimiser_loads_and_rho_stays() -> None:
    model = net(torch.float32)
    plain = torch.optim.AdamW(model.parameters(), lr=0.5)
    loss_of(model).backward()
    plain.step()
    optimizer = tt.ASAM(model.parameters(), torch.optim.AdamW, rho=0.7, eta=0.2, lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.base_optimizer.param_groups[0]
    assert (group["rho"], group["eta"], group["lr"]) == (0.7, 0.2, 0.5)
    torch.testing.assert_close(optimizer.state_dict()["state"], plain.state_dict()["state"], rtol=0, atol=0)
    optimizer.step(closure_of(optimizer, model))
    assert optimizer.state[model[0].weight]["step"] == 2


@pytest.mark.parametrize("way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_copies_go_on_by_themselves_and_alike(way: Any) -> None:
    model, optimizer = trained(tt.SAM, torch.optim.AdamW, 3)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which replaces the method `step` of the instance
    twin, copied = way((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    copied.step(closure_of(copied, twin))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    optimizer.step(closure_of(optimizer, model))
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("closed", [True, False])
def test_schedulers_and_later_groups_reach_the_inner_optimiser(closed: bool) -> None:
    model, extra = net(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = tt.SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.4, momentum=0.9)
    optimizer.add_param_group({"params": [extra], "rho": 0.1, "lr": 7.0})
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert optimizer.defaults["momentum"] == 0.9
    for _ in range(2):
        before = extra.detach().clone()
        lr = optimizer.param_groups[1]["lr"]

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model) + extra.sum()
            loss.backward()
            return loss

        if closed:
            optimizer.step(closure)
        else:
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()  # the schedule takes it for a step, and does not warn
        momentum = optimizer.base_optimizer.state[extra]["momentum_buffer"]
        torch.testing.assert_close(extra.detach(), before - lr * momentum)
        schedule.step()
    assert [group["lr"] for group in optimizer.base_optimizer.param_groups] == [0.1, 1.75]
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -1})
    assert len(optimizer.param_groups) == 2


def test_hooks_of_a_step_are_called_once_whichever_optimiser_they_were_given_to() -> None:
    model = net()
    optimizer = tt.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append("everywhere"))
    try:
        optimizer.step(closure_of(optimizer, model))
        assert calls == ["before", "after", "everywhere"]
        loss_of(model).backward()
        optimizer.first_step()
        loss_of(model).backward()
        optimizer.second_step()
        assert calls == ["before", "after", "everywhere"] * 2
        optimizer.zero_grad()
        optimizer.first_step()
        optimizer.second_step()  # skipped
        assert len(calls) == 6
    finally:
        everywhere.remove()


def test_in_the_hands_of_fabric() -> None:
    fabric_module = pytest.importorskip("lightning_fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    plain, reference = net(), net()
    model, wrapped = fabric.setup(plain, tt.SAM(plain.parameters(), torch.optim.AdamW, lr=0.02))
    other = tt.SAM(reference.parameters(), torch.optim.AdamW, lr=0.02)
    for seed in range(3):

        def closure(seed: int = seed) -> torch.Tensor:
            wrapped.zero_grad()
            loss = loss_of(model, seed)
            fabric.backward(loss)
            return loss

        if seed == 1:
            closure()
            wrapped.first_step()
            closure()
            wrapped.step()
        else:
            wrapped.step(closure)
        other.step(closure_of(other, reference, seed))
    torch.testing.assert_close(plain.state_dict(), reference.state_dict(), rtol=0, atol=0)


def test_what_only_the_inner_optimiser_has_is_there_and_what_it_lacks_is_told() -> None:
    class Averaging(torch.optim.SGD):
        def averaged(self) -> str:
            return "averaged"

    optimizer: Any = tt.SAM(net().parameters(), Averaging, lr=0.1)
    assert optimizer.averaged() == "averaged"
    with pytest.raises(AttributeError, match=r"Averaging.* has no attribute 'nothing'"):
        _ = optimizer.nothing
    assert "rho: 0.05" in repr(optimizer)
