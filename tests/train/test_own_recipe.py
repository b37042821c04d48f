"""The example of a recipe of one's own: it is found by its name, its task is short, and it learns."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab.errors import RecipeError
from trimtab.tasks.recipes import find_recipe
from trimtab.train import train

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_recipe.py"


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    recipe = find_recipe(f"{EXAMPLE}:Adding")
    recipe = replace(recipe, steps=40, warmup_steps=5, watch_every=20, eval_every=40, stabilizer="sigma+qk-norm")
    result = train(recipe, tmp_path)
    assert result.status == "finished"
    assert result.metric == "accuracy"
    assert result.loss < 1.9  # 2.5 is chance over the twelve symbols


def test_its_task_is_about_twenty_lines() -> None:
    module = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    (task,) = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == "task"]
    assert task.end_lineno is not None
    assert task.end_lineno - task.lineno <= 25


def test_its_fields_are_checked_as_any_recipes() -> None:
    recipe = find_recipe(f"{EXAMPLE}:Adding")
    known = "constant, cosine, cosine_restarts, step, inverse_sqrt"
    with pytest.raises(RecipeError, match=f"schedule must be one of {known}; got 'cosin'"):
        replace(recipe, schedule="cosin")
