import dataclasses
import os

import pytest

from trimtab.errors import RecipeError
from trimtab.tasks.images import RECIPES, ImagesRecipe, load_images, vit_digits


def test_every_recipe_makes_a_valid_config_and_says_what_it_is() -> None:
    assert list(RECIPES) == ["vit-digits", "vit-fashion"]
    for make, line in RECIPES.values():
        recipe = make()
        assert isinstance(recipe, ImagesRecipe)
        assert make() == recipe
        assert line
        assert "\n" not in line


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        vit_digits().lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_model_fits_its_data(name: str) -> None:
    recipe = RECIPES[name][0]()
    if recipe.data != "digits" and not os.environ.get("TRIMTAB_DATA"):
        pytest.skip("TRIMTAB_DATA is not set")
    data = load_images(recipe.data)
    channels, height, width = data.train_images.shape[1:]
    assert (recipe.model.in_channels, recipe.model.image_size) == (channels, height)
    assert height == width
    assert recipe.model.num_classes == data.num_classes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stabilizer": "magic"}, "stabilizer must be one of none, sigma, init-scale; got 'magic'"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, sgd"),
        ({"schedule": "linear"}, "schedule must be one of constant, cosine"),
        ({"gamma_init": "two"}, "gamma_init must be spectral, one or a number; got 'two'"),
        ({"gamma_init": 0.0}, "gamma_init must be a number other than zero"),
        ({"lr": -1.0}, "lr must be a positive number, got -1.0"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"clip": 0.0}, "clip must be a positive number, got 0.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -3}, "batch_size must be at least 1"),
        ({"gamma_init": 1e39}, "that float32 can hold"),
        ({"seed": 2**63}, "seed must be at least 0 and below"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"weight_decay": float("inf")}, "weight_decay must be at least 0 and below .* got inf"),
        ({"watch_every": 15}, "eval_every must be a multiple of watch_every.*got 20 and 15"),
    ],
)
def test_a_field_out_of_range_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(vit_digits(), **changes)
