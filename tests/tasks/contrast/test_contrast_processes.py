"""Two processes that share a step, or a measurement, do what one does."""

import os
from dataclasses import replace

import pytest
import torch
from gloo_processes import in_processes
from torch import Tensor, nn

from trimtab.models import ViTConfig
from trimtab.reparam.carried import whole
from trimtab.stabilizers import stabilize_
from trimtab.tasks.contrast import ContrastRecipe, nt_xent
from trimtab.tasks.task import Task
from trimtab.train.evaluate import evaluate
from trimtab.train.hardware import Hardware, distributed, launched

RECIPE = ContrastRecipe(
    data="digits",
    model=ViTConfig(8, 4, 1, 0, dim=16, depth=1, num_heads=2, init="xavier"),
    projector_hidden=16,
    projector_out=8,
    freeze_patches=True,
    stabilizer="sigma:gamma_init=one",
    probe_images=301,
    batch_size=16,
)


def drawn() -> Task:
    torch.manual_seed(0)
    task = RECIPE.task()
    stabilize_(task.model, RECIPE.stabilizer)
    return task


def loss(model: nn.Module, pairs: Tensor) -> Tensor:
    """NT-Xent of views that are given: pairs (B, 2, C, side, side)."""
    _, embeddings = model(torch.cat(pairs.unbind(1)))
    return nt_xent(*embeddings.chunk(2), 0.2)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def check(rank: int, pairs: Tensor, expected: dict[str, Tensor], metrics: dict[str, float]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    for strategy in ("ddp", "fsdp"):
        with launched(Hardware(accelerator="cpu", strategy=strategy), "32") as fabric:
            task = drawn()
            model = distributed(fabric, task.model, compiled=False)
            measured = evaluate(fabric, model, task, task.evaluation, RECIPE)
            # the same features, but for the order in which float32 products are summed; a probe stops at 1e-6
            assert measured["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-3)
            for name in ("probe_accuracy", "knn_accuracy"):
                assert measured[name] == pytest.approx(metrics[name], abs=2 / 360), (strategy, name)  # two near ties
            loss(model, pairs[8 * rank : 8 * rank + 8]).backward()
            found = gradients(task.model)
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_two_processes_measure_and_step_as_one() -> None:
    task, pairs = drawn(), torch.randn(16, 2, 1, 8, 8)
    with launched(Hardware(accelerator="cpu"), "32") as fabric:
        metrics = evaluate(fabric, task.model, task, task.evaluation, RECIPE)
    loss(task.model, pairs).backward()
    in_processes(2, check, pairs, gradients(task.model), metrics)


def test_the_loss_of_a_step_is_that_of_its_two_views() -> None:
    task = replace(RECIPE, stabilizer="none").task()
    batch = task.train.batch(torch.arange(6), None)
    seen: list[Tensor] = []
    task.model.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output[1])))
    found = task.loss(task.model, batch)
    views, embeddings = seen
    assert len(views) == 12
    assert not torch.allclose(views[:6], views[6:])
    torch.testing.assert_close(found, nt_xent(*embeddings.chunk(2), RECIPE.temperature))
