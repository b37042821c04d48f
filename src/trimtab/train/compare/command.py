"""`trimtab compare`."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trimtab.errors import RecipeError, TrimtabError
from trimtab.stabilizers import STABILIZERS
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.recipes import find_recipe
from trimtab.train.compare.grid import parse_lrs, parse_seeds, plan, stabilizer_arms
from trimtab.train.compare.running import compare, finished
from trimtab.train.compare.screen import GridScreen
from trimtab.train.compare.workers import cores, visible_gpus
from trimtab.train.hardware import Hardware
from trimtab.train.recipe_words import about, recipe_and_options, recipe_names, short_name, wrapped
from trimtab.train.screen import console

_USAGE = """usage: trimtab compare NAME --stabilizers LIST --lrs LIST [--seeds N] ...

The same training under several stabilizers, learning rates and seeds, and a
report that opens offline. The same command again goes on where it was stopped;
it may then ask for more learning rates, seeds or stabilizers.

  trimtab compare vit-digits --stabilizers none,sigma+qk-norm --lrs 1e-3:1e-1:5

{recipes}

stabilizers, with + between those that go together (docs/stabilizers.md):
{stabilizers}

  trimtab compare NAME --help tells the options and the recipe's fields."""

_OF_THE_GRID = {"--lr": "--lrs", "--seed": "--seeds", "--stabilizer": "--stabilizers"}
REPORT = "report.html"


@dataclass(frozen=True)
class _Options:
    stabilizers: str
    """Stabilizers, with commas between: none,sigma,qk-norm; + joins several: sigma+qk-norm."""

    lrs: str
    """Learning rates: a list, 1e-3,3e-3, or a range, 1e-3:1e-1:5 for five from the first to the second."""

    seeds: str = "3"
    """How many seeds, or which: 0,4."""

    jobs: int | None = None
    """Runs at a time; None: one on each GPU, or else on each core."""

    ray: str | None = None
    """Address of a Ray cluster that does the runs."""

    folder: Path | None = None
    """Where the runs and the report go; None: runs/compare-NAME."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train; auto takes GPUs where there are some."""

    report: bool = True
    """Write the report."""


def compare_command(words: Sequence[str]) -> int:
    """Run `trimtab compare`.

    Args:
        words: what follows `compare` on the command line.

    Returns:
        The exit code: 0, 1 if a run failed with an error, 130 after Ctrl-C. A run that diverges is a result.

    Raises:
        TrimtabError: the recipe, a field, the grid or the folder is not right; nothing has been trained then.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE.format(recipes=recipe_names(), stabilizers=wrapped(sorted(STABILIZERS))))
        return 0
    name, *rest = words
    if name.startswith("-"):
        raise RecipeError(f"a recipe's name comes first, then {name}: trimtab compare NAME {shlex.join(words)}")
    for word in rest:
        if instead := _OF_THE_GRID.get(word.partition("=")[0]):
            raise RecipeError(f"{word.partition('=')[0]} is what a compare varies: use {instead}")
    recipe, options = recipe_and_options(find_recipe(name), _Options, rest, f"trimtab compare {name}", about(name))
    return _compare(name, recipe, options, shlex.join(["trimtab", "compare", *words]))


def _compare(name: str, recipe: Recipe, options: _Options, again: str) -> int:
    folder = options.folder or Path("runs") / f"compare-{short_name(name)}"
    arms = stabilizer_arms(recipe, options.stabilizers.split(","))
    if options.jobs is not None and options.jobs < 1:
        raise RecipeError(f"--jobs must be at least 1, got {options.jobs}")
    lrs, seeds = parse_lrs(options.lrs), parse_seeds(options.seeds)
    places = plan(arms, lrs, seeds, folder)
    hardware = Hardware(options.accelerator)
    terminal = console()

    def say(*lines: str) -> None:
        terminal.print("\n".join(lines), markup=False, soft_wrap=True)

    jobs = min(options.jobs or (hardware.accelerator != "cpu" and len(visible_gpus())) or cores(), len(places))
    where = f"on the Ray cluster {options.ray}" if options.ray else f"{jobs} at a time"
    grid = " × ".join(
        f"{len(of)} {what}{'s' * (len(of) > 1)}"
        for of, what in ((arms, "stabilizer"), (lrs, "learning rate"), (seeds, "seed"))
    )
    say(f"{len(places)} runs of {recipe.steps:,} steps: {grid}, {where}, into {folder}")
    kept = [place.name for place in places if finished(place)]
    if kept:
        say(f"{len(kept)} of them {'was' if len(kept) == 1 else 'were'} done before")
    screen = GridScreen(places, folder, terminal, kept)
    try:
        with screen:
            compare(
                arms,
                lrs,
                seeds,
                folder,
                jobs=options.jobs,
                ray_address=options.ray,
                on_news=screen.show,
                hardware=hardware,
                facts={"recipe_name": name},
            )
    except KeyboardInterrupt:
        say(
            f"stopped; {len(screen.ended)} of {len(places)} runs are done, and those under way were saved. "
            f"The same command goes on: {again}"
        )
        return 130
    for failed, failure in screen.failures.items():
        say(f"failed: {failed}: {failure.kind}: {failure.error} (run folder: {failure.folder})")
    if options.report:
        try:
            _report(folder, say)
        except (TrimtabError, OSError) as error:  # the runs are worth more than their page
            say(f"there is no report: {error}")
    return 1 if screen.failures else 0


def _report(folder: Path, say: Callable[..., None]) -> None:
    from trimtab.report.compare_page import write_compare_page

    page = write_compare_page([folder], folder / REPORT)
    say("", page.summary, "", f"report: {page.path}")
