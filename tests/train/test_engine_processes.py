"""Two processes train as one does: the same examples, the same evaluation, one log."""

import itertools
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_recipes import lines
from gloo_processes import in_processes
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from trimtab.models import ViTConfig
from trimtab.stabilizers import stabilize_
from trimtab.tasks.images import ImagesRecipe, vit_digits
from trimtab.tasks.task import Examples, Task
from trimtab.train import Hardware, read_result, train
from trimtab.train.checkpoints import load_weights, newest_checkpoint
from trimtab.train.evaluate import evaluate
from trimtab.train.hardware import launched

# Every part at once; no checkpoint between two evaluations, which would let FSDP2 drop weights that it still held
# whole. SGD, since Adam turns a rounding error in a gradient near zero into a step of full length.
RECIPE = replace(
    vit_digits(),
    model=ViTConfig(8, 4, 1, 10, dim=16, depth=1, num_heads=2, init="xavier"),
    stabilizer="sigma",
    optimizer="sgd",
    lr=0.05,
    schedule="cosine",
    warmup_steps=2,
    clip=1.0,
    accumulate=2,
    ema=0.8,
    steps=6,
    batch_size=32,
    watch_every=2,
    eval_every=2,
)
# float32 sums in another order, over six steps
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def join(rank: int, count: int) -> None:
    """Look like a process that torchrun started; the process group is there already."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "test"}


def weights(recipe: ImagesRecipe, folder: Path) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        model: nn.Module = stabilize_(recipe.task().model, recipe.stabilizer)
    newest = newest_checkpoint(folder)
    assert newest is not None
    load_weights(newest, model)
    return model.state_dict()


def check(rank: int, folder: str) -> None:
    join(rank, 2)
    seen = []
    hardware = Hardware(accelerator="cpu", strategy="ddp")
    result = train(RECIPE, f"{folder}/ddp", seen.append, hardware=hardware)
    assert result == read_result(Path(folder, "ddp"))  # the same in both
    assert len(seen) == (4 if rank == 0 else 0)

    hardware = Hardware(accelerator="cpu", strategy="fsdp")
    steps = itertools.count(1)
    terminate = register_optimizer_step_post_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 and next(steps) == 3 else None
    )
    result = train(RECIPE, f"{folder}/fsdp", hardware=hardware)
    assert (result.status, result.steps) == ("interrupted", 4)  # both stop at the next logged step
    terminate.remove()
    result = train(RECIPE, f"{folder}/fsdp", hardware=hardware)
    assert result == read_result(Path(folder, "fsdp"))

    # Running averages of each process's own batches: those of the first are saved, so those are measured with.
    model = nn.BatchNorm1d(1).requires_grad_(False)
    model.running_mean.fill_(3 * rank)
    model.register_buffer("constant", torch.zeros(()).expand(4), persistent=False)
    ones = Examples(3, lambda indices, generator: torch.ones(len(indices), 1))
    task = Task(
        model, ones, lambda model, batch: batch.sum(), ones, None, lambda model, x: {"eval_loss": model(x)[:, 0]}
    )
    with launched(hardware, "32") as fabric:
        measured = evaluate(fabric, model, task, ones, RECIPE)
    assert measured == {"eval_loss": pytest.approx(1.0, rel=1e-4)}  # BatchNorm's own 1e-5 below the root


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = train(RECIPE, tmp_path / "one", lambda _: None)
    torch.set_num_threads(threads)
    in_processes(2, check, str(tmp_path))
    expected, first = weights(RECIPE, tmp_path / "one"), lines(tmp_path / "one")
    for strategy in ("ddp", "fsdp"):
        together = read_result(tmp_path / strategy)
        assert together is not None
        assert (together.status, together.steps, together.best_step) == (alone.status, alone.steps, alone.best_step)
        assert together.metrics == pytest.approx(alone.metrics, rel=1e-4)
        for name, tensor in weights(RECIPE, tmp_path / strategy).items():
            torch.testing.assert_close(tensor, expected[name], **CLOSE)
        second = lines(tmp_path / strategy)
        assert [line["step"] for line in second] == [1, 2, 4, 6]
        for mine, theirs in zip(second, first, strict=True):
            assert ("accuracy" in mine) == ("accuracy" in theirs) == (mine["step"] > 1)
            for name in {"loss", "entropy_min", "accuracy", "eval_loss"} & set(theirs):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4), (strategy, name)
