"""Every recipe by name, a user's own from a Python file, and the one that a run.json tells of."""

import importlib.util
import inspect
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from trimtab.errors import RecipeError
from trimtab.tasks.contrast.recipes import CONTRAST_RECIPES
from trimtab.tasks.forecasting.recipes import FORECASTING_RECIPES
from trimtab.tasks.images.imagenet_recipes import IMAGENET_RECIPES
from trimtab.tasks.images.recipes import (
    vit_cifar10,
    vit_cifar10_deit,
    vit_cifar10_sigma,
    vit_cifar10_sigma_preln,
    vit_digits,
    vit_fashion,
    vit_fashion_deit,
    vit_fashion_sigma,
    vit_fashion_sigma_preln,
)
from trimtab.tasks.language.recipes import LANGUAGE_RECIPES
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.speech.recipes import SPEECH_RECIPES
from trimtab.tasks.translation.recipes import TRANSLATION_RECIPES
from trimtab.tasks.typed import typed
from trimtab.words import nearest

RECIPES: dict[str, Callable[[], Recipe]] = {
    "vit-digits": vit_digits,
    "vit-fashion": vit_fashion,
    "vit-fashion-deit": vit_fashion_deit,
    "vit-fashion-sigma": vit_fashion_sigma,
    "vit-fashion-sigma-preln": vit_fashion_sigma_preln,
    "vit-cifar10": vit_cifar10,
    "vit-cifar10-deit": vit_cifar10_deit,
    "vit-cifar10-sigma": vit_cifar10_sigma,
    "vit-cifar10-sigma-preln": vit_cifar10_sigma_preln,
    **IMAGENET_RECIPES,
    **CONTRAST_RECIPES,
    **LANGUAGE_RECIPES,
    **TRANSLATION_RECIPES,
    **SPEECH_RECIPES,
    **FORECASTING_RECIPES,
}
"""Name to the function that returns the recipe; the first line of its docstring tells what it is."""


def find_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Args:
        name: one of `RECIPES`, or "path/file.py:name" for a user's own: a function without arguments that returns a
            recipe, or a subclass of `Recipe` whose fields all have defaults.

    Raises:
        RecipeError: there is no such recipe; the file cannot be read or run (with the line); or what it names is no
            recipe.
    """
    if name in RECIPES:
        return RECIPES[name]()
    path, _, inside = name.rpartition(":") if ":" in name else (name, "", "")
    if path.endswith(".py"):
        if inside:
            return _own_recipe(Path(path), inside)
        known = _makers(_module(Path(path)))
        found = f"; there are: {', '.join(known)}" if known else ""
        raise RecipeError(f"which recipe of {path}? Write {path}:NAME{found}")
    names = ", ".join(RECIPES)
    raise RecipeError(f"unknown recipe {name!r}.{nearest(name, RECIPES)} There are: {names}; yours: file.py:NAME")


def recipe_of(run_info: Mapping[str, Any]) -> Recipe:
    """The recipe that a run.json tells of, equal to the one that was run. Fields that it lacks have their defaults.

    Args:
        run_info: the content of run.json: "recipe", with "recipe_name" or, of a recipe that comes with Trimtab, "task".

    Raises:
        RecipeError: the class of the recipe cannot be found, or a field is unknown or ill-typed.
    """
    content = run_info.get("recipe")
    if not isinstance(content, Mapping):
        raise RecipeError("this run.json has no recipe; it was not written by `trimtab train` or `trimtab compare`")
    recipe: Recipe = typed(_recipe_class(run_info), content)
    return recipe


def _recipe_class(run_info: Mapping[str, Any]) -> type[Recipe]:
    name = run_info.get("recipe_name")
    if isinstance(name, str):
        try:
            return type(find_recipe(name))
        except RecipeError as error:
            raise RecipeError(f"{error} (the run.json names the recipe {name!r}; a path begins here)") from error
    classes = {type(make()).__name__: type(make()) for make in RECIPES.values()}
    task = str(run_info.get("task"))
    if task not in classes:
        raise RecipeError(
            f"this run.json tells no recipe_name, and its task {task!r} is not one of Trimtab's "
            f'({", ".join(classes)}); write the file of your recipe into it: "recipe_name": "file.py:NAME"'
        )
    return classes[task]


def _own_recipe(path: Path, name: str) -> Recipe:
    module = _module(path)
    make = getattr(module, name, None)
    if make is None:
        known = _makers(module)
        listed = f" There are: {', '.join(known)}" if known else ""
        raise RecipeError(f"{path} has no {name!r}.{nearest(name, known)}{listed}")
    if not callable(make):
        raise RecipeError(
            f"{name} of {path} is {_kind(make)}; expected a function that returns a Recipe, or a subclass"
        )
    try:
        recipe = make()
    except Exception as error:
        raise _failure(path, error) from error
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{name}() of {path} returned something {_kind(recipe)}; expected a trimtab.tasks.recipe.Recipe"
        )
    _check_class(path, type(recipe))
    return recipe


def _check_class(path: Path, recipe: type[Recipe]) -> None:
    """Refuse a class that would train something else than it says, or nothing."""
    if recipe.task is Recipe.task:
        raise RecipeError(f"{recipe.__name__} of {path} has no method `task`: write one that returns a Task")
    for cls in recipe.__mro__[: recipe.__mro__.index(Recipe)]:
        written = inspect.get_annotations(cls)
        if written and "__dataclass_fields__" not in vars(cls):
            raise RecipeError(
                f"{cls.__name__} of {path} is no dataclass, so that its {', '.join(written)} would not count: write "
                "@dataclass(frozen=True, kw_only=True) above it"
            )
        for field in fields(recipe):
            if field.name in vars(cls).keys() - written.keys():
                raise RecipeError(
                    f"{field.name} of {cls.__name__} of {path} has no type, so that it would not count: write "
                    f"{field.name}: TYPE = ..., in a dataclass"
                )


def _module(path: Path) -> ModuleType:
    """Run a Python file once; the same content is the same module, so that its recipes equal each other."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror})") from None
    path = path.resolve()
    name = f"trimtab_recipe_{path.stem}_{zlib.crc32(bytes(path) + content):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # as it is for every file that ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    sys.path.insert(0, str(path.parent))  # as `python file.py` would, for what lies beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failure(path, error) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _makers(module: ModuleType) -> list[str]:
    """The names that a file defines itself and that could be recipes."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module.__name__
        and (not isinstance(value, type) or issubclass(value, Recipe))
    ]


def _failure(path: Path, error: Exception | SystemExit) -> RecipeError:
    """An error that happened in a user's file, with the last line of that file that was being run."""
    if isinstance(error, SyntaxError) and error.filename == str(path.resolve()):
        line = error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path.resolve())), None)
    place = f"{path}, line {line}" if line else str(path)
    return RecipeError(f"{place}: {type(error).__name__}: {error}")


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
