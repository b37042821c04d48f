"""The same training under every arm, learning rate and seed of a grid, many runs at a time."""

import json
import math
import os
import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import RecipeError, RunFolderError, TrimtabError
from trimtab.stabilizers import Stabilizer, parse
from trimtab.tasks.recipe import Recipe
from trimtab.train.compare.check import refuse_if_none_can_begin
from trimtab.train.compare.folder import open_compare, plain
from trimtab.train.compare.grid import RunPlace, plan
from trimtab.train.compare.parcels import pack
from trimtab.train.compare.workers import cores, run_all, visible_gpus
from trimtab.train.folder import ERROR, RUN
from trimtab.train.hardware import Hardware
from trimtab.train.loop import train
from trimtab.train.progress import Progress, Result, read_result
from trimtab.watch.runlog import STEPS, write_json

_TAIL = 1_000_000  # bytes that hold the last line of a log
_PRELOAD = ("lightning_fabric", "torch._dynamo", "trimtab.train.compare.running")  # seconds of importing


@dataclass(frozen=True)
class Failure:
    """A run that raised, or whose process was killed; the other runs go on. It is in error.json of the run's folder.

    Attributes:
        folder: the run's.
        kind: the name of the exception, or "WorkerDied".
        error: what it says.
    """

    folder: Path
    kind: str
    error: str


OnNews = Callable[[str, Progress | Result | Failure], None]


def compare(
    arms: Mapping[str, Recipe],
    lrs: Sequence[float],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    jobs: int | None = None,
    ray_address: str | None = None,
    on_news: OnNews | None = None,
    hardware: Hardware = Hardware(),  # noqa: B008 - it is frozen
    facts: Mapping[str, Any] | None = None,
) -> list[RunPlace]:
    """Train every arm at every learning rate with every seed; all arms see the same seeds and order of examples.

    In a folder that holds a part of this compare it goes on: finished and diverged runs are kept, unfinished ones
    continued, failed ones tried again. Learning rates, seeds and arms may be added so to an earlier compare, as long
    as the arms that it has are still there, with the same recipes.

    Ctrl-C and SIGTERM stop it: runs under way save a checkpoint first, from which the same call continues.

    Args:
        arms: name of each arm, and its recipe; its learning rate and seed are replaced by the grid's.
        lrs: learning rates.
        seeds: seeds.
        folder: receives compare.json and a folder for every run, runs/<arm>/lr<lr>-seed<seed>.
        jobs: runs at the same time; by default one on each GPU, or else on each core. They share GPUs or cores evenly.
        ray_address: of a Ray cluster that does the runs, "auto" for the one this machine belongs to; all of its
            nodes need the folder at the same path.
        on_news: called with a run's name and how it goes: `Progress` at logged steps, `Result` or `Failure` at its
            end. Runs that were finished before are told of first.
        hardware: of each run.
        facts: for every run.json; "recipe_name" goes to compare.json, too.

    Returns:
        The runs in the order in which they train. The folder of each has result.json, or error.json.

    Raises:
        RecipeError: the grid is empty or not valid, or a recipe or stabilizer is. Nothing has been written then.
        TrimtabError: no arm could begin, all for the same reason, such as data that are missing (a `DataError`).
            Nothing has been written then, either. Runs on a Ray cluster find out for themselves.
        RunFolderError: the folder holds another compare, or something else.
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    lrs, seeds = [float(lr) for lr in lrs], [int(seed) for seed in seeds]  # NumPy's are no JSON
    places = plan(arms, lrs, seeds, folder)
    facts = dict(facts or {})
    _refuse(places, jobs, ray_address, hardware, facts)
    open_compare(Path(folder), arms, lrs, seeds, facts.get("recipe_name"))
    _run(places, jobs, None, ray_address, on_news or _ignore, hardware, facts)
    return places


def run_places(
    places: Sequence[RunPlace],
    *,
    jobs: int | None = None,
    threads: int | None = None,
    ray_address: str | None = None,
    on_news: OnNews | None = None,
    hardware: Hardware = Hardware(),  # noqa: B008 - it is frozen
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Result | Failure]:
    """Train planned runs, wherever they lie; see `compare`.

    Args:
        places: the runs.
        jobs: as in `compare`.
        threads: of torch in each run; by default the cores are shared.
        ray_address: as in `compare`.
        on_news: as in `compare`.
        hardware: as in `compare`.
        facts: as in `compare`.

    Returns:
        How each run ended, by name.

    Raises:
        RecipeError, TrimtabError, KeyboardInterrupt: as `compare`.
    """
    facts = dict(facts or {})
    _refuse(places, jobs, ray_address, hardware, facts)
    return _run(places, jobs, threads, ray_address, on_news or _ignore, hardware, facts)


def _refuse(
    places: Sequence[RunPlace],
    jobs: int | None,
    ray_address: str | None,
    hardware: Hardware,
    facts: Mapping[str, Any],
) -> None:
    """Raise what is known to be wrong before any run begins."""
    if jobs is not None and jobs < 1:
        raise RecipeError(f"jobs must be at least 1, got {jobs}")
    _tasks(places, hardware, facts)
    if ray_address is None:  # other machines have other data
        refuse_if_none_can_begin([place for place in places if not finished(place)], hardware)


def _run(
    places: Sequence[RunPlace],
    jobs: int | None,
    threads: int | None,
    ray_address: str | None,
    tell: OnNews,
    hardware: Hardware,
    facts: Mapping[str, Any],
) -> dict[str, Result | Failure]:
    outcomes: dict[str, Result | Failure] = {}
    for place in places:
        if result := finished(place):
            outcomes[place.name] = result
            tell(place.name, result)
    tasks = _tasks([place for place in places if place.name not in outcomes], hardware, facts)
    if ray_address is not None and tasks:
        from trimtab.train.compare.ray_cluster import run_on_ray

        folder = Path(os.path.commonpath([place.folder.absolute() for place in places]))
        outcomes |= run_on_ray(
            _train,
            tasks,
            ray_address,
            folder,
            jobs=jobs,
            gpus=hardware.accelerator != "cpu",
            look=_look,
            tell=tell,
            lost=_lost,
        )
    elif tasks:
        gpus = [] if hardware.accelerator == "cpu" else visible_gpus()
        jobs = jobs or len(gpus) or cores()
        threads = threads or max(1, cores() // jobs)
        outcomes |= run_all(
            _train, tasks, jobs=jobs, threads=threads, gpus=gpus, preload=_PRELOAD, tell=tell, lost=_lost
        )
    return outcomes


def finished(place: RunPlace) -> Result | None:
    """The result of a planned run, or None if its folder holds no whole one of the same recipe."""
    try:
        info = json.loads((place.folder / RUN).read_bytes())
        same = (info["task"], info["recipe"]) == (type(place.recipe).__name__, plain(place.recipe))
        return read_result(place.folder) if same else None
    except (OSError, ValueError, TypeError, KeyError, RunFolderError):  # train() says what is wrong with it
        return None


def _tasks(places: Sequence[RunPlace], hardware: Hardware, facts: Mapping[str, Any]) -> dict[str, "_Task"]:
    """What workers are to do.

    Raises:
        RecipeError: a recipe cannot travel to them.
    """
    tasks = {}
    for place in places:
        # With a stabilizer's class comes its file, which registers it.
        classes = tuple(type(stabilizer) for stabilizer in parse(place.recipe.stabilizer))
        tasks[place.name] = task = (place, classes, hardware, facts)
        try:
            pack(task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            name = type(place.recipe).__name__
            raise RecipeError(
                f"the recipe {name} cannot be sent to another process ({error}): define its classes at the top level "
                "of a file, and keep plain values in its fields"
            ) from None
    return tasks


_Task = tuple[RunPlace, tuple[type[Stabilizer], ...], Hardware, Mapping[str, Any]]


def _train(task: _Task, tell: Callable[[Progress], None]) -> Result | Failure:
    """Train one run, in a worker; what it raises is recorded and ends nothing else."""
    place, _, hardware, facts = task
    with suppress(OSError):
        (place.folder / ERROR).unlink()
    _forget_peak_memory()
    try:
        return train(place.recipe, place.folder, tell, hardware=hardware, facts={**facts, "arm": place.arm})
    except RunFolderError as error:  # another process is at work there, or it is another's: nothing is written to it
        return Failure(place.folder, type(error).__name__, str(error))
    except Exception as error:
        lines = "" if isinstance(error, TrimtabError) else traceback.format_exc()
        return _record(place, type(error).__name__, str(error), lines)


def _forget_peak_memory() -> None:
    """Let the peak be that of the next run, not of all that this process has done."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux has it
        Path("/proc/self/clear_refs").write_text("5")


def _look(task: _Task) -> Progress | None:
    """How a run goes, from the last line of its log."""
    place = task[0]
    try:
        with open(place.folder / STEPS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            line = json.loads(file.read().splitlines()[-1])
        loss, seconds = float(line["loss"]), float(line["time"])
        lr = line["lr"][0] if isinstance(line["lr"], list) else line["lr"]
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or just being written
        return None
    low = line.get("entropy_min")
    alarms = tuple(alarm["message"] for alarm in line.get("alarms", ()))
    entropy = None if low is None else float(low)
    return Progress(line["step"], place.recipe.steps, loss, lr, {}, entropy, None, alarms, seconds, math.nan)


def _lost(task: _Task, kind: str, error: str) -> Result | Failure:
    place = task[0]
    return finished(place) or _record(place, kind, error)  # it may have been killed just after its end


def _record(place: RunPlace, kind: str, error: str, lines: str = "") -> Failure:
    """Write error.json; of a run that has not begun, it alone tells which one it was."""
    recipe = place.recipe
    content = {"kind": kind, "error": error, "arm": place.arm, "lr": recipe.lr, "seed": recipe.seed}
    if lines:
        content["traceback"] = lines
    with suppress(OSError):  # of a full disk, perhaps, which may be what the error is about
        place.folder.mkdir(parents=True, exist_ok=True)
        write_json(place.folder / ERROR, content)
    return Failure(place.folder, kind, error)


def _ignore(name: str, news: object) -> None:
    """Tell nobody."""
