"""Find the runs under some paths, read what is readable, and list the rest with the reason."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.errors import RunFolderError
from trimtab.report.runlog import read_json
from trimtab.report.summary import RunSummary, read_summary

_MARKS = ("run.json", "steps.jsonl", "error.json", "result.json")  # any of them makes a folder a run's


@dataclass(frozen=True)
class Unreadable:
    """A place where nothing could be read.

    Attributes:
        path: where.
        reason: why.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class Collection:
    """What lies under some paths.

    Attributes:
        runs: the runs that could be read, by folder.
        unreadable: the rest.
        arms: the names of arms that compare folders list, in their order.
    """

    runs: tuple[RunSummary, ...]
    unreadable: tuple[Unreadable, ...]
    arms: tuple[str, ...] = ()


def collect(paths: Sequence[str | Path]) -> Collection:
    """Read every run under these paths.

    Args:
        paths: run folders, compare folders, or folders that hold either anywhere below; links are followed, once.

    Returns:
        The runs and what could not be read; nothing is raised for a damaged folder.
    """
    runs: list[RunSummary] = []
    unreadable: list[Unreadable] = []
    compares: dict[Path, dict[str, Any]] = {}
    seen: set[Path] = set()
    for path in map(Path, paths):
        if not path.is_dir():
            reason = "it is a file; name the folder of a run" if path.exists() else "there is no such folder"
            unreadable.append(Unreadable(path, reason))
            continue
        found = list(_folders(path, seen, unreadable))
        if not found and not any(entry.path.is_relative_to(path) for entry in unreadable):
            unreadable.append(Unreadable(path, "there is no run in it, or it was already named"))
        for folder in found:
            try:
                compare = _compare_of(folder, compares)
                runs.append(read_summary(folder, _planned(folder, compare)))
            except RunFolderError as error:
                unreadable.append(Unreadable(folder, str(error)))
            except OSError as error:
                unreadable.append(Unreadable(folder, f"it cannot be read: {error.strerror or error}"))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                unreadable.append(Unreadable(folder, f"it is not a run as Trimtab writes it ({error})"))
    arms = dict.fromkeys(str(arm) for compare in compares.values() for arm in compare.get("arms", {}))
    return Collection(tuple(_told_apart(_grouped(runs, compares))), tuple(unreadable), tuple(arms))


def nothing_readable(collection: Collection) -> str:
    """The message when there is no run at all."""
    listed = "; ".join(f"{each.path}: {each.reason}" for each in collection.unreadable[:5])
    more = f"; and {len(collection.unreadable) - 5} more" if len(collection.unreadable) > 5 else ""
    return f"nothing to report: {listed or 'no path was given'}{more}"


def _folders(path: Path, seen: set[Path], unreadable: list[Unreadable]) -> Iterator[Path]:
    """The run folders at and below a folder, in the order of their names."""

    def cannot(error: OSError) -> None:
        where = Path(error.filename or path)
        unreadable.append(Unreadable(where, f"it cannot be read: {error.strerror or error}"))

    for place, names, files in os.walk(path, onerror=cannot, followlinks=True):
        real = Path(place).resolve()
        if real in seen:  # linked from two places, or from inside itself
            names.clear()
            continue
        seen.add(real)
        names.sort()
        if any(mark in files for mark in _MARKS):
            names.clear()  # checkpoints and the like
            yield Path(place)


def _compare_of(folder: Path, known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """The compare.json of the compare that a run lies in, {} if it lies in none."""
    for parent in list(folder.absolute().parents)[:4]:
        if parent in known:
            return known[parent]
        if (parent / "compare.json").is_file():
            try:
                known[parent] = read_json(parent / "compare.json")
            except RunFolderError:  # the runs tell enough
                known[parent] = {}
            return known[parent]
    return {}


def _planned(folder: Path, compare: dict[str, Any]) -> dict[str, Any] | None:
    """The arm and recipe of a run that wrote no run.json, by its place: runs/ARM/lrLR-seedSEED."""
    lr, _, seed = folder.name.removeprefix("lr").rpartition("-seed")
    arms = compare.get("arms")
    if not isinstance(arms, dict) or not lr or not seed.isdigit():
        return None
    names = [name for name in arms if name == folder.parent.name or _plain(name) == _plain(folder.parent.name)]
    if len(names) != 1:
        return None
    try:
        return {"arm": names[0], "recipe": dict(arms[names[0]]) | {"lr": float(lr), "seed": int(seed)}}
    except (ValueError, TypeError):
        return None


def _plain(name: str) -> str:
    """A name as far as a folder's name may hold it."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _grouped(runs: Sequence[RunSummary], compares: Mapping[Path, object]) -> list[RunSummary]:
    """Give every run its group; the runs of one compare, which someone chose to compare, have that of most of them."""
    keys = [_comparable(run) for run in runs]
    places = [
        next((str(at) for at in compares if run.folder.absolute().is_relative_to(at / "runs")), "") for run in runs
    ]
    counted = {place: Counter(key for key, at in zip(keys, places, strict=True) if at == place) for place in {*places}}
    return [
        replace(run, group=counted[place].most_common(1)[0][0] if place else key)
        for run, key, place in zip(runs, keys, places, strict=True)
    ]


def _told_apart(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """Give arms of one name but different recipes names of their own: "none [optimizer=sgd]"."""
    recipes: dict[tuple[object, ...], dict[str, dict[str, str]]] = {}
    for run in runs:
        recipes.setdefault((run.arm, run.group), {})[_rest_key(run)] = _rest(run)
    renamed = []
    for run in runs:
        variants = list(recipes[run.arm, run.group].values())
        names = dict.fromkeys(name for variant in variants for name in variant)
        differing = [name for name in names if len({variant.get(name) for variant in variants}) > 1]
        mine = _rest(run)
        told = ", ".join(f"{name}={mine.get(name, '–')}" for name in differing)
        renamed.append(replace(run, arm=f"{run.arm} [{told}]") if told else run)
    return renamed


# Fields that decide when a run is looked at, not what it computes.
_IDLE = {"lr", "seed", "watch", "watch_every", "eval_every", "checkpoint_every", "keep"}


# Fields that decide what a run learns, and what it is measured on.
_DATA = {"source", "target", "test", "tokens", "stride", "evaluation_tokens", "splits", "validation"}


def _rest(run: RunSummary) -> dict[str, str]:
    """The recipe flat, without what differs within one arm."""
    return {name: str(value) for name, value in flat(run.recipe).items() if name.split(".")[0] not in _IDLE}


def _rest_key(run: RunSummary) -> str:
    return str(sorted(_rest(run).items()))


def _comparable(run: RunSummary) -> tuple[tuple[str, str], ...]:
    """What two runs must have in common to be compared: task, data, budget and the sizes of the model."""
    recipe = flat(run.recipe)
    key = {"task": str(run.info.get("task", ""))}
    for name, value in recipe.items():
        budget = name in ("steps", "seconds", "batch_size", "batch_tokens")
        field = name.split(".")[0]
        data = field.startswith("data") or field in _DATA
        size = name.startswith("model.") and isinstance(value, int) and not isinstance(value, bool)
        if (budget or data or size) and value is not None:
            key[name] = str(value)
    return tuple(sorted(key.items()))


def flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested recipe with dotted names."""
    entries: dict[str, Any] = {}
    for name, value in recipe.items():
        entries |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return entries
