"""A recipe from the words of a command: its name, then its fields and the command's own options."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from trimtab.errors import RecipeError
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.recipes import RECIPES
from trimtab.words import parse_words

T = TypeVar("T")


def recipe_and_options(
    recipe: Recipe, options: type[T], words: Sequence[str], prog: str, description: str | None = None
) -> tuple[Recipe, T]:
    """Override a recipe's fields, and a command's options, by what was typed.

    Args:
        recipe: its fields are flags, ``--lr``; those of a dataclass in it have its name before them, ``--model.depth``.
        options: a dataclass, whose fields are flags, too.
        words: what was typed after the recipe's name.
        prog: the command, for its help.
        description: one line for its help; the first of the recipe's class by default.

    Raises:
        RecipeError: a field is out of range, has no effect beside another, or is called like one of the options.
        WordsError: a field is unknown or ill-typed.
    """
    import tyro

    own: Any = options
    taken = {field.name for field in fields(own)} & {field.name for field in fields(recipe)}
    if taken:
        raise RecipeError(f"the recipe's field {taken.pop()!r} is an option of {prog.rsplit(' ', 1)[0]}: rename it")
    bare = tyro.conf.arg(name="")
    both = make_dataclass(
        "Words",
        [
            ("options", Annotated[own, bare, tyro.conf.FlagCreatePairsOff]),
            ("recipe", Annotated[type(recipe), bare], recipe),
        ],
        frozen=True,
    )
    parsed: Any = parse_words(both, words, prog=prog, description=description or _first_line(recipe))
    flags = {word.partition("=")[0].replace("_", "-") for word in words}
    if "--batch-size" in flags and parsed.recipe.batch_tokens is not None:
        raise RecipeError(
            f"--batch-size has no effect beside batch_tokens, which is {parsed.recipe.batch_tokens} and decides how "
            "many examples a step has: set --batch-tokens instead, or --batch-tokens None as well"
        )
    return parsed.recipe, parsed.options


def about(name: str) -> str | None:
    """One line about a recipe that comes with Trimtab."""
    return _first_line(RECIPES[name]) if name in RECIPES else None


def recipe_list() -> str:
    """Every recipe's name, with one line about it."""
    lines = {name: _first_line(make) for name, make in RECIPES.items()}
    lines["file.py:NAME"] = "your own: a function that returns a Recipe, or a subclass."
    width = max(map(len, lines)) + 2
    return "\n".join(["recipes:", *(f"  {name:<{width}}{line}" for name, line in lines.items())])


def recipe_names() -> str:
    """The names alone, in lines of at most 80 characters."""
    return "recipes, of which `trimtab recipes` tells more:\n" + wrapped([*RECIPES, "yours: file.py:NAME"])


def wrapped(names: Iterable[str]) -> str:
    """Names in lines of at most 80 characters, indented."""
    text = ", ".join(names)
    return textwrap.fill(text, 80, break_on_hyphens=False, initial_indent="  ", subsequent_indent="  ")


def short_name(name: str) -> str:
    """A recipe's name as a folder is called: "vit-digits", or "Mine" for "file.py:Mine"."""
    return Path(name.rpartition(":")[2]).name


def _first_line(documented: object) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]
