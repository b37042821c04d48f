"""The runs of a compare: arms × learning rates × seeds, each with its recipe and its place. Nothing is written here."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trimtab.errors import RecipeError
from trimtab.stabilizers import with_changes
from trimtab.tasks.recipe import Recipe

RUNS = "runs"  # the folder in a compare's that holds the runs
_LONGEST = 120  # characters of an arm's folder: file systems allow 255 bytes
_DIGITS = 6  # significant ones of a learning rate, as many as a folder's name shows


@dataclass(frozen=True)
class RunPlace:
    """One planned run: what it trains and where.

    Attributes:
        name: what it is called, e.g. "sigma lr0.01 seed0".
        arm: the side of the comparison that it belongs to.
        recipe: with its own learning rate and seed.
        folder: its run folder.
    """

    name: str
    arm: str
    recipe: Recipe
    folder: Path


def plan(arms: Mapping[str, Recipe], lrs: Sequence[float], seeds: Sequence[int], folder: str | Path) -> list[RunPlace]:
    """List the runs of a grid in the order in which they train.

    Seed by seed, then learning rate by learning rate, so that a part of the grid is a fair table too.

    Args:
        arms: name of each arm, and its recipe at any learning rate and seed.
        lrs: learning rates.
        seeds: seeds; the same ones for every arm and learning rate.
        folder: the compare's; a run lies in runs/<arm>/lr<lr>-seed<seed> below it.

    Raises:
        RecipeError: nothing to run, an arm, learning rate or seed twice or out of range, or a recipe whose stabilizer
            is unknown or does not go with it.
    """
    for what, given in (("arm", arms), ("learning rate", lrs), ("seed", seeds)):
        if not given:
            raise RecipeError(f"a compare needs at least one {what}, this one has none")
    _refuse_twice("learning rate", [f"{lr:g}" for lr in lrs])
    _refuse_twice("seed", [str(seed) for seed in seeds])
    for lr in lrs:
        if not (math.isfinite(lr) and lr > 0):
            raise RecipeError(f"a learning rate must be a positive number, got {lr:g}")
    folders = {arm: Path(folder) / RUNS / folder_name(arm) for arm in arms}
    taken: dict[str, str] = {}
    for arm, recipe in arms.items():
        other = taken.setdefault(folders[arm].name.lower(), arm)  # some file systems do not tell A from a
        if other != arm:
            raise RecipeError(f"the arms {other!r} and {arm!r} would share the folder {folders[arm].name}; rename one")
        with_changes(recipe, recipe.stabilizer)
    return [
        RunPlace(f"{arm} lr{lr:g} seed{seed}", arm, replace(recipe, lr=lr, seed=seed), folders[arm] / _run(lr, seed))
        for seed in seeds
        for lr in lrs
        for arm, recipe in arms.items()
    ]


def stabilizer_arms(recipe: Recipe, stabilizers: Iterable[str]) -> dict[str, Recipe]:
    """The same recipe under each of these stabilizers.

    Raises:
        RecipeError: one of them is unknown, does not go with the recipe, or is named twice.
    """
    specs = [spec.strip() for spec in stabilizers]
    _refuse_twice("stabilizer", specs)
    arms = {spec: replace(recipe, stabilizer=spec) for spec in specs}
    for spec, arm in arms.items():
        with_changes(arm, spec)
    return arms


def parse_lrs(text: str) -> tuple[float, ...]:
    """Learning rates from "1e-3,3e-3", or from "1e-3:1e-1:5", five from the first to the second by one factor.

    Raises:
        RecipeError: the text is neither.
    """
    low, *rest = text.split(":")
    try:
        if not rest:
            return tuple(float(part) for part in low.split(",") if part.strip())
        first, last, count = float(low), float(rest[0]), int(rest[1])
        if len(rest) != 2 or not 0 < first < last < math.inf or count < 2:
            raise ValueError
    except (ValueError, IndexError):
        raise RecipeError(
            "learning rates are a list, 1e-3,3e-3, or a range from low to high in a number of steps, 1e-3:1e-1:5; "
            f"got {text!r}"
        ) from None
    factor = (last / first) ** (1 / (count - 1))
    return tuple(float(f"{first * factor**index:.{_DIGITS}g}") for index in range(count))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from "3", which is 0, 1 and 2, or from a list, "0,4".

    Raises:
        RecipeError: the text is neither.
    """
    try:
        if "," in text:
            return tuple(int(part) for part in text.split(",") if part.strip())
        return tuple(range(int(text)))
    except ValueError:
        raise RecipeError(f"seeds are how many, 3, or a list, 0,4; got {text!r}") from None


def folder_name(arm: str) -> str:
    """The arm's name with what not every file system takes in a name replaced by "_".

    Raises:
        RecipeError: nothing is left, or too much.
    """
    name = re.sub(r"[^\w.+=-]+", "_", arm, flags=re.ASCII).lstrip(".")
    if not name or len(name) > _LONGEST:
        raise RecipeError(f"an arm's name must have 1 to {_LONGEST} characters for its folder, got {arm!r}")
    return name


def _run(lr: float, seed: int) -> str:
    return f"lr{lr:g}-seed{seed}"


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise RecipeError(f"{what} {name} is there twice")
