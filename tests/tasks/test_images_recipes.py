import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trimtab.errors import DataError, RecipeError
from trimtab.stabilizers import stabilize_
from trimtab.tasks.images import ImagesRecipe, images_recipe, load_images, vit_digits
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.recipes import RECIPES
from trimtab.train import Hardware, train


class Fixed(nn.Module):
    """A classifier that says the same whatever it sees: logits (B, K)."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_is_the_same_each_time_and_has_a_line_about_itself(name: str) -> None:
    recipe = RECIPES[name]()
    assert isinstance(recipe, Recipe)
    assert RECIPES[name]() == recipe
    first = (RECIPES[name].__doc__ or "").partition("\n")[0]
    assert 20 < len(first) < 90
    assert first.endswith(".")


SMALL_SETS = [name for name in RECIPES if name.startswith(("vit-digits", "vit-fashion", "vit-cifar10"))]


@pytest.mark.parametrize("name", SMALL_SETS)
def test_a_recipe_makes_its_task(name: str) -> None:
    recipe = RECIPES[name]()
    if name != "vit-digits" and not os.environ.get("TRIMTAB_DATA"):
        pytest.skip("TRIMTAB_DATA is not set")
    if "cifar10" in name:
        recipe = dataclasses.replace(recipe, data="cifar10-jpeg")
    torch.manual_seed(0)
    task = recipe.task()
    images, labels = batch = task.train.batch(torch.tensor([3, 0]), torch.Generator())
    assert images.shape[0] == labels.shape[0] == 2
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    stabilize_(task.model, recipe.stabilizer)
    assert task.loss(task.model, batch).isfinite()
    assert (task.metric, task.higher_is_better) == ("accuracy", True)


def small_imagenet(name: str) -> ImagesRecipe:
    """An ImageNet recipe with everything of it but its size."""
    recipe = RECIPES[name]()
    assert isinstance(recipe, ImagesRecipe)
    model = dataclasses.replace(recipe.model, image_size=2 * recipe.model.patch_size, dim=16, num_heads=2, depth=2)
    return dataclasses.replace(recipe, data="fake-imagenet:16", model=model)


@pytest.mark.parametrize("way", ["deit", "sigma", "sigma-preln"])
@pytest.mark.parametrize("size", ["b16", "h14"])
def test_an_imagenet_recipe_trains_on_fake_images(size: str, way: str) -> None:
    recipe = small_imagenet(f"vit-{size}-{way}")
    torch.manual_seed(0)
    task = recipe.task()
    stabilize_(task.model, recipe.stabilizer)
    norms = [each for each in task.model.modules() if isinstance(each, nn.LayerNorm)]
    assert len(norms) == (0 if way == "sigma" else 5)
    (optimizer,) = recipe.optimizers(task.model)
    assert type(optimizer).__name__ == ("AdamW" if way == "deit" else "LARS")
    batch = task.train.batch(torch.arange(8), torch.Generator())
    before = task.model.blocks[0].mlp.up.weight.detach().clone()
    task.loss(task.model, batch).backward()
    optimizer.step()
    assert task.model.blocks[0].mlp.up.weight.isfinite().all()
    assert not torch.equal(task.model.blocks[0].mlp.up.weight, before)


def test_the_numbers_of_the_imagenet_recipes() -> None:
    deit, sigma = RECIPES["vit-b16-deit"](), RECIPES["vit-b16-sigma"]()
    large = RECIPES["vit-l16-sigma"]()
    assert isinstance(deit, ImagesRecipe)
    assert isinstance(sigma, ImagesRecipe)
    assert isinstance(large, ImagesRecipe)
    assert (deit.batch_size, deit.lr, deit.weight_decay) == (1024, 1e-3, 0.05)
    assert deit.steps == 375_300  # 300 epochs of 1,251 whole batches
    assert deit.warmup_steps == 5 * 1251
    assert (sigma.warmup_steps, sigma.weight_decay, sigma.optimizer) == (0, 0.0, "lars")
    assert sigma.stabilizer == "sigma:gamma_init=one:remove_norms=true"
    assert (deit.model, deit.augment, deit.steps) == (sigma.model, sigma.augment, sigma.steps)
    assert (sigma.model.drop_path, large.model.drop_path) == (0.1, 0.2)
    assert (sigma.model.patch_gain, large.model.patch_gain) == (1.0, 0.125)


def test_the_same_seed_draws_the_same_model_and_another_another() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(vit_digits().task().model.parameters())

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_batches_are_the_images_of_their_indices() -> None:
    data, task = load_images("digits"), vit_digits().task()
    order = torch.tensor([5, 5, 0])
    images, labels = task.train.batch(order, torch.Generator())
    assert data.train.images is not None
    assert data.test.images is not None
    assert torch.equal(images, data.train.images[order])
    assert torch.equal(labels, data.train.labels[order])
    assert task.train.size == 1437
    assert task.evaluation is not None
    assert task.test is None
    images, labels = task.evaluation.batch(torch.arange(360), torch.Generator())
    assert torch.equal(images, data.test.images)
    assert torch.equal(labels, data.test.labels)


class Kept(nn.Module):
    """A classifier that remembers what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return self.scale * images.flatten(1)[:, :10]


def test_the_model_sees_standardized_images() -> None:
    data, task, model = load_images("digits"), vit_digits().task(), Kept()
    assert data.train.images is not None
    assert task.score is not None
    batch = task.train.batch(torch.arange(20), torch.Generator())
    expected = (data.train.images[:20].double() - data.mean) / data.std
    for look in (task.loss, task.score):
        look(model, batch)
        torch.testing.assert_close(model.seen.double(), expected, rtol=1e-6, atol=1e-6)


def test_validation_holds_out_the_same_images_whatever_the_seed() -> None:
    data = load_images("digits")
    assert data.train.images is not None
    parts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        task = dataclasses.replace(vit_digits(), validation=200, seed=seed).task()
        assert (task.train.size, task.evaluation.size, task.test.size) == (1237, 200, 360)  # type: ignore[union-attr]
        parts.append([part.batch(torch.arange(part.size), torch.Generator()) for part in (task.train, task.evaluation)])  # type: ignore[union-attr]
        assert torch.equal(task.test.batch(torch.arange(360), torch.Generator())[1], data.test.labels)  # type: ignore[union-attr]
    for first, second in zip(*parts, strict=True):
        assert torch.equal(first[0], second[0])
    rows = torch.cat([images for images, _ in parts[0]]).flatten(1)
    labels = torch.cat([labels for _, labels in parts[0]])
    together = sorted(map(tuple, torch.cat([rows.long(), labels[:, None]], dim=1).tolist()))
    whole = torch.cat([data.train.images.flatten(1).long(), data.train.labels[:, None]], dim=1)
    assert together == sorted(map(tuple, whole.tolist()))
    assert torch.bincount(parts[0][1][1], minlength=10).min() > 5  # of every class


def test_the_score_counts_each_image_and_not_finite_logits_as_wrong() -> None:
    task = vit_digits().task()
    assert task.score is not None
    inf, nan = math.inf, math.nan
    model = Fixed([[2.0, 0.0], [2.0, 0.0], [inf, 0.0], [nan, 0.0]])
    labels = torch.tensor([0, 1, 0, 0])
    blank = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    scores = task.score(model, (blank, labels))
    assert scores["accuracy"].tolist() == [1, 0, 0, 0]
    by_hand = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))]  # -log softmax of the label, nats
    assert scores["eval_loss"][:2].tolist() == pytest.approx(by_hand, rel=1e-6)  # float32
    assert not scores["eval_loss"][2:].isfinite().any()
    mean = task.loss(Fixed([[2.0, 0.0], [2.0, 0.0]]), (blank[:2], labels[:2]))
    assert mean.item() == pytest.approx(sum(by_hand) / 2, rel=1e-6)


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        vit_digits().lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"image_size": 16}, "digits needs model image_size 8, the recipe has 16"),
        ({"in_channels": 3}, "digits needs model in_channels 1, the recipe has 3"),
        (
            {"image_size": 16, "in_channels": 3},
            r"digits needs model image_size 8, in_channels 1, the recipe has 16, 3: --model\.image-size 8 --model\.in",
        ),
        (
            {"num_classes": 5},
            r"digits needs model num_classes 10 \(0, 1, 2, 3, 4, \.\.\.\), the recipe has 5: --model\.num-classes 10",
        ),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(model: dict[str, int], message: str) -> None:
    recipe = vit_digits()
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **model))
    with pytest.raises(RecipeError, match=message):
        recipe.task()


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises(DataError, match=r"Did you mean digits\?"):
        dataclasses.replace(vit_digits(), data="digit").task()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": -1}, "validation must be at least 0, got -1"),
        ({"validation": 1437}, "validation must be below the 1,437 training images of digits, got 1,437"),
        ({"new_head": True}, "new_head is for a start from weights"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(vit_digits(), **changes).task()


@pytest.mark.parametrize("classes", [0, 1])
def test_a_model_that_tells_nothing_apart_is_refused(classes: int) -> None:
    with pytest.raises(
        RecipeError, match=rf"model\.num_classes must be at least 2 to tell images apart, got {classes}"
    ):
        dataclasses.replace(vit_digits(), model=dataclasses.replace(vit_digits().model, num_classes=classes))


def test_a_run_tells_how_many_files_were_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = load_images("digits")
    small = dataclasses.replace(vit_digits().model, dim=8, depth=1, num_heads=1)
    recipe = dataclasses.replace(vit_digits(), model=small, steps=1, watch=False)
    for number, unreadable in enumerate(((), ("train/3/a.png", "val/4/b.png"))):
        found = dataclasses.replace(data, unreadable=unreadable)
        monkeypatch.setattr(images_recipe, "load_images", lambda *_, found=found: found)
        train(recipe, tmp_path / str(number), hardware=Hardware("cpu"))
        run = json.loads((tmp_path / str(number) / "run.json").read_text())
        assert run.get("unreadable_files", 0) == len(unreadable)


def test_data_of_one_class_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataclasses.replace(load_images("digits"), classes=("thing",))
    monkeypatch.setattr(images_recipe, "load_images", lambda *_: data)
    with pytest.raises(DataError, match=r"digits has one class only \(thing\): telling images apart takes two"):
        vit_digits().task()
