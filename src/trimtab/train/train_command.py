"""`trimtab train` and `trimtab recipes`."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from trimtab.errors import RecipeError, RunFolderError
from trimtab.report.runlog import read_json
from trimtab.report.terminal import duration
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.recipes import find_recipe, recipe_of
from trimtab.train.checkpoints.files import CHECKPOINTS, in_order, step_of
from trimtab.train.folder import RUN
from trimtab.train.hardware import Hardware, Strategy
from trimtab.train.loop import train
from trimtab.train.progress import RESULT, Result
from trimtab.train.recipe_words import about, recipe_and_options, recipe_list, recipe_names, short_name
from trimtab.train.screen import RunScreen, console, figures
from trimtab.words import nearest

_USAGE = """usage: trimtab train NAME [--FIELD VALUE ...] [--folder FOLDER]
       trimtab train --from RUN/run.json [--FIELD VALUE ...] [--folder FOLDER]

Train one recipe, watched. The same command again goes on where it was stopped,
bit for bit; --from repeats an earlier run in a new folder.

{recipes}

  trimtab train NAME --help tells a recipe's fields and their defaults."""


@dataclass(frozen=True)
class _Options:
    folder: Path | None = None
    """The run's folder, a new one or one to go on in; None: runs/NAME, with --from a new one beside that run."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train; auto takes a GPU where there is one."""

    strategy: Strategy = "auto"
    """How several processes (torchrun) share the work; auto is ddp."""


def recipes_command(words: Sequence[str]) -> int:
    """Run `trimtab recipes`: print the names, with one line each."""
    if words and words[0] not in ("-h", "--help"):
        raise RecipeError(
            f"trimtab recipes takes nothing more, got {words[0]!r}; trimtab train NAME --help tells fields"
        )
    print(recipe_list())
    return 0


def train_command(words: Sequence[str]) -> int:
    """Run `trimtab train`.

    Args:
        words: what follows `train` on the command line.

    Returns:
        The exit code: 0 for a run that ended, diverged or not; 130 for one that Ctrl-C stopped.

    Raises:
        TrimtabError: the recipe, a field, the data or the folder are not right.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE.format(recipes=recipe_names()))
        return 0
    first, *rest = words
    again = ["trimtab", "train", *words]
    if first.partition("=")[0] == "--from":
        path = first.partition("=")[2] or (rest.pop(0) if rest else "")
        recipe, facts, folder = _earlier(Path(path))
        recipe, options = recipe_and_options(recipe, _Options, rest, f"trimtab train --from {path}")
        if options.folder is None:  # the next time, it would be another new one
            _refuse_several(folder)
            again += ["--folder", str(folder)]
    elif first.startswith("-"):
        near = nearest(first, ["--from"])
        raise RecipeError(f"a recipe's name comes first, then {first}: trimtab train NAME {shlex.join(words)}.{near}")
    elif any(word.partition("=")[0] == "--from" for word in rest):
        raise RecipeError(f"--from stands in the place of the recipe's name: leave {first} out")
    else:
        recipe, facts, folder = find_recipe(first), {"recipe_name": first}, Path("runs") / short_name(first)
        recipe, options = recipe_and_options(recipe, _Options, rest, f"trimtab train {first}", about(first))
    hardware = Hardware(options.accelerator, options.strategy)
    return _train(recipe, options.folder or folder, hardware, facts, shlex.join(again))


def train_on_screen(
    recipe: Recipe, folder: Path, terminal: Console, hardware: Hardware, facts: Mapping[str, Any] | None = None
) -> Result:
    """Train as `trimtab.train.train` does, and show it: live in a terminal, a line for each logged step elsewhere."""
    started_at = 0 if (folder / RESULT).is_file() else last_checkpoint(folder)
    with RunScreen(folder, terminal, recipe.seconds, started_at) as screen:
        return train(recipe, folder, screen.show, hardware=hardware, facts=facts)


def _train(recipe: Recipe, folder: Path, hardware: Hardware, facts: Mapping[str, Any], again: str) -> int:
    terminal = console(quiet=_rank() > 0)
    finished = (folder / RESULT).is_file()
    result = train_on_screen(recipe, folder, terminal, hardware, facts)
    lines = []
    if finished:
        lines.append(
            f"{folder} holds this run, at its end; to train it anew, choose another --folder, or remove this one"
        )
    lines += _ending(result, recipe, again)
    terminal.print("\n".join(lines), markup=False, soft_wrap=True)
    return 130 if result.status == "interrupted" else 0


def _ending(result: Result, recipe: Recipe, again: str) -> list[str]:
    """How the run ended, and what to do next."""
    if result.status == "interrupted":
        return [stopped(result, again)]
    steps, folder = f"{result.steps:,} of {recipe.steps:,} steps", result.folder
    lines = [f"{result.status} after {steps}, {duration(result.seconds)}, loss {result.loss:.4g}"]
    if result.metrics:
        lines.append(_numbers("metrics", result.metrics))
    if result.best and result.best != result.metrics:
        lines.append(_numbers(f"best {result.metric}, at step {result.best_step:,}", result.best))
    if result.test:
        lines.append(_numbers("on the test examples", result.test))
    lines += _signatures(folder)
    if result.status == "diverged":
        lines.append(
            f"what to try: a lower learning rate (--lr {recipe.lr / 3:.1g}), a warmup (--warmup-steps "
            f"{max(1, recipe.steps // 10)}), or a stabilizer (--stabilizer sigma); docs/stabilizers.md tells which"
        )
    lines.append(
        f"speed: {result.samples_per_second:,.0f} samples/s; the loader alone would make "
        f"{result.loader_samples_per_second:,.0f}"
    )
    return [*lines, f"run folder: {folder}", f"next: trimtab report {shlex.quote(str(folder))}"]


def _signatures(folder: Path) -> list[str]:
    """How a metric was computed, as sacrebleu's signature tells: numbers compare only under the same."""
    info = read_json(folder / RUN)
    return [f"{name.replace('_', ' ')}: {value}" for name, value in info.items() if name.endswith("_signature")]


def _numbers(title: str, metrics: Mapping[str, float]) -> str:
    return f"{title}: " + ", ".join(f"{name} {figures(value)}" for name, value in metrics.items())


def stopped(result: Result, again: str) -> str:
    """What is told of a run that Ctrl-C stopped, and that goes on by the command `again`."""
    saved = last_checkpoint(result.folder)  # on a full disk, an earlier one
    where = "stopped" if saved == result.steps else f"stopped at step {result.steps:,}"
    return f"{where}; saved at step {saved:,}. The same command goes on: {again}"


def last_checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max((step_of(path) or 0 for path in in_order(folder / CHECKPOINTS)), default=0)


def _earlier(path: Path) -> tuple[Recipe, dict[str, Any], Path]:
    """An earlier run's recipe and facts, and a new folder beside its own."""
    path = path / "run.json" if path.is_dir() else path
    info = read_json(path)
    if not info:
        raise RunFolderError(f"there is no {path}; --from takes the run.json of a run, or its folder")
    _tell_of_versions(info)
    folder = path.parent if path.parent.name not in ("", "..") else path.resolve().parent  # which has a name
    names = (folder.with_name(f"{folder.name}-again{number}") for number in ("", *range(2, 10_000)))
    facts = {key: info[key] for key in ("recipe_name",) if key in info}
    return recipe_of(info), facts, next(name for name in names if not name.exists())


def _tell_of_versions(info: Mapping[str, Any]) -> None:
    from trimtab import __version__

    for name, here in (("trimtab", __version__), ("torch", str(torch.__version__))):
        if name in info and info[name] != here and not _rank():
            print(f"note: that run used {name} {info[name]}, this is {here}: numbers may differ", file=sys.stderr)


def _refuse_several(folder: Path) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunFolderError(f"several processes need to agree on a new folder: name it, --folder {folder}")


def _rank() -> int:
    """Which of several processes this is; the first shows what the run does."""
    return int(os.environ.get("RANK", "0"))
