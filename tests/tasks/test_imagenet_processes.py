"""A dry run of an ImageNet recipe, with fake images, as two processes would make it."""

import contextlib
import io
import multiprocessing
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_processes import in_processes
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from trimtab.tasks.images import ImageData, images_recipe
from trimtab.tasks.recipes import find_recipe
from trimtab.train import Hardware, train
from trimtab.train.checkpoints import newest_checkpoint
from trimtab.train.order import batch_indices
from trimtab.train.train_command import train_command

# All of the recipe but its length and depth: images of 224 pixels, 1,000 classes, augmentation, bfloat16, LARS.
CHANGES = {"data": "fake-imagenet:12", "batch_size": 4, "steps": 4}
EVERY = {"watch_every": 1, "eval_every": 4, "checkpoint_every": 2}
WORDS = ["vit-ti16-sigma", "--model.depth", "1", "--accelerator", "cpu"]


def recorded(read: list[list[int]], shapes: set[tuple[int, ...]]) -> None:
    """Make `load_images` of the recipe note which training images are read."""
    load = images_recipe.load_images

    def load_recorded(*arguments: object) -> ImageData:
        data = load(*arguments)

        def read_recorded(indices: Tensor, generator: torch.Generator | None) -> Tensor:
            images = data.train.read(indices, generator)
            read.append(indices.tolist())
            shapes.add(tuple(images.shape))
            return images

        return replace(data, train=replace(data.train, read=read_recorded))

    images_recipe.load_images = load_recorded


@contextlib.contextmanager
def standard_error_to(path: Path) -> Iterator[None]:
    """What this process writes to its standard error, also past Python, goes to a file."""
    before = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def check(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as torchrun does
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    read, shapes = [], set()
    recorded(read, shapes)
    told, errors = io.StringIO(), Path(folder, f"errors-{rank}")
    words = [word for name, value in (CHANGES | EVERY).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with contextlib.redirect_stdout(told), standard_error_to(errors):
        assert train_command([*WORDS, *words, "--folder", f"{folder}/whole"]) == 0

    # Each process has read its own half of every batch, and the two of them the whole of it.
    assert shapes == {(2, 3, 224, 224)}
    halves = [None, None]
    dist.all_gather_object(halves, read)
    for step in range(1, 5):
        both = [*halves[0][step - 1], *halves[1][step - 1]]
        assert both == batch_indices(12, 4, 0, step).tolist()
        assert len(set(both)) == 4

    # Torch's advice against find_unused_parameters, which no user can follow, is not heard.
    assert "find_unused_parameters" not in errors.read_text()

    # It tells how fast it is, once.
    speed = re.findall(r"speed: ([\d,]+) samples/s; the loader alone would make ([\d,]+)", told.getvalue())
    assert len(speed) == (1 if rank == 0 else 0)

    # Killed in its third step, it goes on from its second to the very same weights.
    recipe = find_recipe("vit-ti16-sigma")
    recipe = replace(recipe, model=replace(recipe.model, depth=1), **CHANGES, **EVERY)
    hardware = Hardware(accelerator="cpu")
    steps = []

    def stop(*_: object) -> None:
        steps.append(1)
        if len(steps) == 3:
            raise SystemExit("killed")

    killed = register_optimizer_step_post_hook(stop)
    with pytest.raises(SystemExit, match="killed"):
        train(recipe, f"{folder}/killed", hardware=hardware)
    killed.remove()
    progress = []
    result = train(recipe, f"{folder}/killed", progress.append, hardware=hardware)
    assert result.status == "finished"
    assert [each.step for each in progress] == ([3, 4] if rank == 0 else [])
    assert all(each.samples_per_second > 0 for each in progress)

    # With shards of the weights, and LARS on them, it is the same run.
    result = train(recipe, f"{folder}/fsdp", hardware=Hardware(accelerator="cpu", strategy="fsdp"))
    assert result.status == "finished"


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and "forkserver" in multiprocessing.get_all_start_methods()),
    reason="needs gloo and a fork server",
)
def test_an_imagenet_recipe_runs_in_two_processes_on_fake_images(tmp_path: Path) -> None:
    pytest.importorskip("kornia")
    in_processes(2, check, str(tmp_path))
    whole, killed = (
        load_file(newest_checkpoint(tmp_path / name) / "model.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert whole["head.weight"].shape == (1000, 192)
    sharded = load_file(newest_checkpoint(tmp_path / "fsdp") / "model.safetensors")
    for name, tensor in whole.items():  # the same sums in another order, over four steps
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-5)
