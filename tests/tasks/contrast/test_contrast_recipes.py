import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_recipes import assert_same, numbers
from safetensors.torch import load_file

from trimtab.errors import RecipeError
from trimtab.models import ViTConfig
from trimtab.stabilizers import stabilize_
from trimtab.tasks.contrast import ContrastRecipe
from trimtab.tasks.contrast.recipes import CONTRAST_RECIPES
from trimtab.tasks.images.sets import load_images
from trimtab.train import Hardware, train
from trimtab.train.checkpoints import newest_checkpoint
from trimtab.train.progress import Progress

CPU = Hardware(accelerator="cpu")
SMALL = ContrastRecipe(
    data="digits",
    model=ViTConfig(8, 4, 1, 0, dim=16, depth=1, num_heads=2, init="xavier"),
    projector_hidden=16,
    projector_out=8,
    freeze_patches=True,
    stabilizer="sigma:gamma_init=one",
    lr=3e-3,
    weight_decay=0.1,
    steps=8,
    batch_size=32,
    probe_images=300,
    validation=200,
    watch_every=4,
    eval_every=4,
    checkpoint_every=4,
)


@pytest.mark.parametrize("name", list(CONTRAST_RECIPES))
def test_every_recipe_makes_its_task(name: str) -> None:
    recipe = CONTRAST_RECIPES[name]()
    assert CONTRAST_RECIPES[name]() == recipe
    if "cifar10" in name:
        recipe = replace(recipe, data="cifar10-jpeg")  # the copy that is small enough for a checkout
    if not os.environ.get("TRIMTAB_DATA"):
        pytest.skip("TRIMTAB_DATA is not set")
    task = recipe.task()
    stabilize_(task.model, recipe.stabilizer)
    batch = task.train.batch(torch.tensor([3, 0, 5]), torch.Generator())
    assert (batch.dtype, len(batch)) == (torch.uint8, 3)
    assert task.loss(task.model, batch).isfinite()
    assert (task.metric, task.higher_is_better) == ("probe_accuracy", True)


def test_what_is_held_out_is_neither_trained_on_nor_known_to_the_probe() -> None:
    data, task = load_images("digits"), SMALL.task()
    assert (task.train.size, task.evaluation.size, task.test.size) == (1237, 200, 360)
    everyone = torch.cat(
        [task.train.batch(torch.arange(1237), None), task.evaluation.batch(torch.arange(200), None)[0]]
    )
    assert torch.equal(everyone.flatten(1).unique(dim=0), data.train.images.flatten(1).unique(dim=0))
    held_out = {bytes(image.flatten().tolist()) for image in task.evaluation.batch(torch.arange(200), None)[0]}
    seen: list[torch.Tensor] = []
    task.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        known = task.prepare(task.model)
    images = torch.cat(seen)
    assert len(images) == len(known.features) == len(known.labels) == 300
    raw = (images * data.std + data.mean).round().to(torch.uint8)
    assert not held_out & {bytes(image.flatten().tolist()) for image in raw}
    labels = {bytes(i.flatten().tolist()): int(y) for i, y in zip(data.train.images, data.train.labels, strict=True)}
    assert [labels[bytes(image.flatten().tolist())] for image in raw] == known.labels.tolist()


def test_scores_are_the_probes_and_the_neighbours() -> None:
    torch.manual_seed(0)
    task = replace(SMALL, validation=0).task()
    assert task.test is None
    with torch.no_grad():
        task.model.eval()
        known = task.prepare(task.model)
        images, labels = task.evaluation.batch(torch.arange(360), None)
        scores = task.score(task.model, (images, labels), known)
        logits = known.probe.logits(task.model(load_images("digits").standardize(images))[0])
    assert scores["probe_accuracy"].mean() == (logits.argmax(dim=1) == labels).float().mean()
    chosen = logits.log_softmax(dim=1)[torch.arange(360), labels]
    torch.testing.assert_close(scores["eval_loss"], -chosen)
    assert scores["probe_accuracy"].mean() > 0.5  # random features already tell digits apart
    assert scores["knn_accuracy"].mean() > 0.5


def test_a_run_goes_on_to_the_same_bits_and_leaves_the_patches_alone(tmp_path: Path) -> None:
    whole = train(SMALL, tmp_path / "whole", hardware=CPU)
    assert whole.status == "finished"
    assert set(whole.metrics) == set(whole.test) == {"probe_accuracy", "knn_accuracy", "eval_loss"}

    def break_off(progress: Progress) -> None:
        if progress.step == 8:
            raise InterruptedError("after the checkpoint of step 4")

    with pytest.raises(InterruptedError):
        train(SMALL, tmp_path / "parts", break_off, hardware=CPU)
    train(SMALL, tmp_path / "parts", hardware=CPU)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    final, parts = (load_file(newest_checkpoint(tmp_path / name) / "model.safetensors") for name in ("whole", "parts"))
    assert_same(parts, final)
    torch.manual_seed(SMALL.seed)
    assert torch.equal(final["encoder.patches.weight"], SMALL.task().model.encoder.patches.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 2}, "accumulate must be 1, got 2: the negatives of an image are those of its micro-batch"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a positive number, got nan"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1: the negatives of an image are the others"),
        ({"probe_images": 0}, "probe_images must be at least 1"),
    ],
)
def test_what_would_be_another_loss_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(SMALL, **changes)


def test_batch_norm_over_processes_without_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.tasks.contrast.contrast_recipe.place", lambda: (0, 2))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RecipeError, match='use "none", or one process'):
        replace(SMALL, projector_norm="batch").task()


def test_a_run_tells_of_files_that_were_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data = replace(load_images("digits"), unreadable=("train/0/a.jpg", "val/3/b.jpg"))
    monkeypatch.setattr("trimtab.tasks.contrast.contrast_recipe.load_images", lambda *args, **options: data)
    assert SMALL.task().facts == {"unreadable_files": 2}


def test_a_run_tells_of_a_probe_of_fewer_images_than_asked_for() -> None:
    assert replace(SMALL, probe_images=1437, validation=0).task().facts == {}
    assert replace(SMALL, probe_images=1437, validation=37).task().facts == {"images_of_the_probe": 1400}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": replace(SMALL.model, num_classes=10)}, "num_classes must be 0, got 10"),
        ({"model": replace(SMALL.model, image_size=16)}, "digits needs model image_size 8, the recipe has 16"),
        ({"validation": 1437}, "validation must leave some of the 1,437 training images, got 1,437"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(SMALL, **changes).task()
