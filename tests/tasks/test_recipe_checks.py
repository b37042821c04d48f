from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import RecipeError
from trimtab.tasks.recipe import Recipe

DOCS = Path(__file__).parents[2] / "docs" / "engine.md"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr must be a positive number, got -1"),
        ({"lr": "fast"}, "lr must be a number; got 'fast'"),
        ({"lr": float("nan")}, "lr must be a positive number, got nan"),
        ({"clip": 0.0}, "clip must be a positive number"),
        ({"rho": 0.0}, "rho must be a positive number"),
        ({"adaptive": True}, "adaptive is of SAM, and there is none without its radius"),
        ({"rho": 0.1, "optimizer": "muon"}, "which does not go with optimizer muon"),
        ({"rho": 0.1, "precision": "fp16"}, "which does not go with precision fp16"),
        ({"ema": 1.0}, "ema must be between 0 and 1"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"trust_coefficient": 0.0}, "trust_coefficient must be a positive number"),
        ({"betas": (0.9,)}, "betas must have 2 values; got 1"),
        ({"min_lr": 0.1, "lr": 0.01}, "min_lr must be from 0 to lr, 0.01; got 0.1"),
        ({"min_lr": -0.1}, "min_lr must be from 0 to lr"),
        ({"restart_every": 0}, "restart_every must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, "steps must be a whole number; got 1.5"),
        ({"watch": 1}, "watch must be true or false; got 1"),
        ({"seed": -1}, "seed must be at least 0 and below"),
        ({"optimizer": "adamm"}, "optimizer must be one of adamw, adam, sgd, lars, muon; got 'adamm'"),
        ({"eval_every": 30}, "eval_every must be a multiple of watch_every"),
        ({"accumulate": 3}, "batch_size must be a multiple of accumulate, got 64 and 3"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**change)


def test_equal_values_make_equal_recipes() -> None:
    recipe = Recipe(lr=1, betas=[0.9, 0.99], clip=1)
    assert recipe == Recipe(lr=1.0, betas=(0.9, 0.99), clip=1.0)
    assert type(recipe.lr) is float
    assert replace(recipe, lr=2).lr == 2.0


def test_the_docs_tell_of_every_field() -> None:
    text = DOCS.read_text(encoding="utf-8")
    table = text[text.index("## Fields of every recipe") : text.index("## How a run ends")]
    for field in fields(Recipe):
        assert f"`{field.name}`" in table, field.name


def test_a_recipe_without_a_task_says_what_is_missing() -> None:
    with pytest.raises(RecipeError, match="Recipe has no task: give it a method `task`"):
        Recipe().task()
