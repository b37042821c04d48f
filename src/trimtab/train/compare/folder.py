"""The folder of a compare: compare.json, which says what is compared there, and the folders of its runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab.errors import RunFolderError
from trimtab.tasks.recipe import Recipe
from trimtab.train.compare.grid import RUNS
from trimtab.train.folder import first_difference
from trimtab.watch.runlog import to_json, write_json

COMPARE = "compare.json"


def open_compare(
    folder: Path, arms: Mapping[str, Recipe], lrs: Sequence[float], seeds: Sequence[int], recipe_name: object
) -> None:
    """Make the folder, or find in it a compare that this one goes on with, and write compare.json.

    compare.json has the recipe of every arm, and all learning rates and seeds that were ever asked for. That of a
    compare that did not come to its first run is replaced.

    Raises:
        RunFolderError: the folder holds a compare with an arm that this one lacks or has with another recipe, or it
            holds something else. Nothing of it was touched.
    """
    path = folder / COMPARE
    recipes = {arm: plain(recipe) for arm, recipe in arms.items()}
    before: dict[str, Any] = {"lrs": [], "seeds": []}
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; a compare needs a folder")
    if path.is_file() and (folder / RUNS).exists():
        try:
            before = json.loads(path.read_bytes())
            _refuse_another(folder, before["arms"], recipes)
            before = {"lrs": list(before["lrs"]), "seeds": list(before["seeds"])}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise RunFolderError(f"{path} is damaged; choose another folder, or remove {folder} first") from None
    elif folder.is_dir() and any(entry.name not in (COMPARE, f"{COMPARE}.part") for entry in folder.iterdir()):
        raise RunFolderError(f"{folder} is not empty and holds no compare; choose another folder")
    content = {
        "recipe_name": recipe_name,
        "arms": recipes,
        "lrs": sorted({*before["lrs"], *lrs}),
        "seeds": sorted({*before["seeds"], *seeds}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise RunFolderError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as its run.json gives it back."""
    content: dict[str, Any] = json.loads(to_json(asdict(recipe)))
    return content


def _refuse_another(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for arm, recipe in there.items():
        if arm not in here:
            raise RunFolderError(
                f"{folder} holds a compare with the arm {arm!r}, which this one lacks; name all its arms "
                f"({', '.join(there)}) and those to add, or choose another folder"
            )
        varied = {"lr": None, "seed": None}
        difference = first_difference(recipe | varied, here[arm] | varied, "recipe")
        if difference is not None:
            name, then, now = difference
            raise RunFolderError(
                f"{folder} holds another compare: {name} of the arm {arm!r} is {then} there and {now} here; "
                "choose another folder"
            )
