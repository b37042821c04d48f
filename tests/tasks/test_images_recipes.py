import dataclasses
import math
import os

import pytest
import torch
from torch import Tensor, nn

from trimtab.errors import DataError, RecipeError
from trimtab.tasks.images import load_images, vit_digits
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.recipes import RECIPES


class Fixed(nn.Module):
    """A classifier that says the same whatever it sees: logits (B, K)."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_makes_its_task(name: str) -> None:
    recipe = RECIPES[name]()
    assert isinstance(recipe, Recipe)
    assert RECIPES[name]() == recipe
    if name == "vit-fashion" and not os.environ.get("TRIMTAB_DATA"):
        pytest.skip("TRIMTAB_DATA is not set")
    torch.manual_seed(0)
    task = recipe.task()
    images, labels = batch = task.train.batch(torch.tensor([3, 0]), torch.Generator())
    assert images.shape[0] == labels.shape[0] == 2
    assert task.loss(task.model, batch).isfinite()
    assert (task.metric, task.higher_is_better) == ("accuracy", True)


def test_the_same_seed_draws_the_same_model_and_another_another() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(vit_digits().task().model.parameters())

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_batches_are_the_standardized_images_of_their_indices() -> None:
    data, task = load_images("digits"), vit_digits().task()
    order = torch.tensor([5, 5, 0])
    images, labels = task.train.batch(order, torch.Generator())
    assert torch.equal(images, (data.train_images[order].float() - data.mean) / data.std)
    assert torch.equal(labels, data.train_labels[order])
    assert task.train.size == 1437
    assert task.evaluation is not None
    images, labels = task.evaluation.batch(torch.arange(360), torch.Generator())
    assert torch.equal(images, data.standardize(data.test_images))
    assert torch.equal(labels, data.test_labels)


def test_the_score_counts_each_image_and_not_finite_logits_as_wrong() -> None:
    task = vit_digits().task()
    assert task.score is not None
    inf, nan = math.inf, math.nan
    model = Fixed([[2.0, 0.0], [2.0, 0.0], [inf, 0.0], [nan, 0.0]])
    labels = torch.tensor([0, 1, 0, 0])
    scores = task.score(model, (torch.zeros(4, 1), labels))
    assert scores["accuracy"].tolist() == [1, 0, 0, 0]
    by_hand = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))]  # -log softmax of the label, nats
    assert scores["eval_loss"][:2].tolist() == pytest.approx(by_hand, rel=1e-6)  # float32
    assert not scores["eval_loss"][2:].isfinite().any()
    mean = task.loss(Fixed([[2.0, 0.0], [2.0, 0.0]]), (torch.zeros(2, 1), labels[:2]))
    assert mean.item() == pytest.approx(sum(by_hand) / 2, rel=1e-6)


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        vit_digits().lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"image_size": 16}, "digits needs model image_size 8, the recipe has 16"),
        ({"in_channels": 3}, "digits needs model in_channels 1, the recipe has 3"),
        ({"num_classes": 5}, "digits needs model num_classes 10, the recipe has 5"),
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
