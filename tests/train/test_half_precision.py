"""fp16 with loss scaling, on a CPU, where torch can do it and the engine, for its slowness, does not offer it."""

import pytest
import torch
from engine_recipes import Small
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch import nn

from trimtab.tasks.task import Task
from trimtab.train.step import step_function


@pytest.fixture
def fabric() -> Fabric:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])


def small(seed: int = 0) -> Task:
    torch.manual_seed(seed)
    return Small(dropout=0.0).task()


def two_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    first, second, third = model[0].parameters(), model[2].parameters(), model[4].parameters()
    return [torch.optim.SGD(first, 0.1), torch.optim.SGD([*second, *third], 0.1)]


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_step_is_near_that_in_float32(fabric: Fabric, clip: float | None) -> None:
    half, plain = small(), small()
    recipe = Small(clip=clip)
    batch = half.train.batch(torch.arange(16), torch.Generator())
    step_function(fabric, half.model, half, two_optimizers(half.model), recipe)([batch])
    alone = Fabric(accelerator="cpu", devices=1)
    step_function(alone, plain.model, plain, two_optimizers(plain.model), recipe)([batch])
    for found, expected, start in zip(
        half.model.parameters(), plain.model.parameters(), small().model.parameters(), strict=True
    ):
        assert not torch.equal(found, start)
        # float16 has 11 bits: the steps agree to about 1e-3 of the longest
        torch.testing.assert_close(found - start, expected - start, rtol=0.02, atol=2e-4)


def test_a_step_that_overflows_is_skipped_by_all_and_the_scale_is_halved_once(fabric: Fabric) -> None:
    task = small()
    scaler = fabric.strategy.precision.scaler
    step = step_function(fabric, task.model, task, two_optimizers(task.model), Small(clip=1.0))
    inputs, targets = task.train.batch(torch.arange(16), torch.Generator())
    step([(inputs, targets)])
    before = [p.detach().clone() for p in task.model.parameters()]
    step([(inputs, targets + 1e5)])  # its gradients are beyond what float16 can hold
    for p, kept in zip(task.model.parameters(), before, strict=True):
        assert torch.equal(p, kept)
    assert scaler.get_scale() == 512
    step([(inputs, targets)])
    assert not torch.equal(task.model[0].weight, before[0])
    assert scaler.get_scale() == 512
