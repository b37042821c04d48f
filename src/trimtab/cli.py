"""The command line: `trimtab demo`, `train NAME`, `watch FOLDER`, `inspect FILE`, `--version`.

Heavy imports wait until a command needs them. An error that a user can act on is one line on stderr and exit code 2.
"""

import difflib
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trimtab.errors import RecipeError, TrimtabError

if TYPE_CHECKING:
    from trimtab.train.loop import Progress

_USAGE = """usage: trimtab COMMAND ...

Keeps Transformer training stable: watch instability coming, steady it, compare the cures.

commands:
  demo                the whole story in about a minute, on real images, offline
  train NAME ...      train one recipe, watched; without NAME: the list of recipes
  watch FOLDER        a run in the terminal, live while it goes on
  inspect FILE        spectral norms, stable ranks, q/k energy, TEV of any checkpoint, layer by layer

  trimtab COMMAND --help tells a command's options, trimtab --version the version."""

_LAB = {"tyro", "rich", "plotly", "safetensors", "PIL"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `trimtab`; those of the process by default.

    Returns:
        The exit code: 0 when all went well, 2 for an error the user can act on, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × or σ shows ? instead of ending the run
    try:
        return _run(words)
    except SystemExit as end:  # tyro has printed its message
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        print("stopped; what was logged until now is kept", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _LAB:
            raise
        return _fail(f"this command needs {error.name}: pip install 'trimtab[lab]'")
    except BrokenPipeError:  # `trimtab inspect ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it when it ends
        return 0
    except (TrimtabError, OSError) as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        return _fail("there is not enough memory for this model and batch: make them smaller")


def _run(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    if command == "--version":
        from trimtab import __version__

        print(f"trimtab {__version__}")
        return 0
    if command == "demo":
        return _demo(rest)
    if command == "train":
        return _train(rest)
    if command == "watch":
        from trimtab.report.terminal import watch_command

        return watch_command(rest)
    if command == "inspect":
        from trimtab.inspect.command import inspect_command

        return inspect_command(rest)
    raise RecipeError(_unknown("command", command, ["demo", "train", "watch", "inspect"]))


def _demo(words: list[str]) -> int:
    import tyro

    from trimtab.demo import demo

    options = tyro.cli(_DemoOptions, args=words, prog="trimtab demo")
    demo(options.folder, open_page=options.open)
    return 0


@dataclass(frozen=True)
class _DemoOptions:
    """One small Transformer, plain and steadied, on real digits: a live table, then a page to open in a browser."""

    folder: Path = Path("runs/demo")
    """Where the runs and the page go; an earlier demo there is replaced."""

    open: bool = False
    """Open the page in the browser at the end."""


def _train(words: list[str]) -> int:
    from trimtab.tasks.images.recipes import RECIPES, ImagesRecipe

    if not words or words[0] in ("-h", "--help"):
        print("usage: trimtab train NAME [--folder FOLDER] [--FIELD VALUE ...]\n\nrecipes:")
        for name, (_, line) in RECIPES.items():
            print(f"  {name:<18}  {line}")
        print("\n  trimtab train NAME --help tells a recipe's fields and their defaults.")
        return 0
    name = words[0]
    if name.startswith("-"):
        raise RecipeError(f"a recipe's name comes first, then {name}: trimtab train NAME {' '.join(words)}")
    if name not in RECIPES:
        raise RecipeError(_unknown("recipe", name, list(RECIPES)))

    import tyro

    from trimtab.train.loop import train

    make, line = RECIPES[name]
    default = make()

    def options(
        recipe: Annotated[ImagesRecipe, tyro.conf.arg(name="")] = default, folder: Path = Path("runs") / name
    ) -> tuple[ImagesRecipe, Path]:
        return recipe, folder

    recipe, folder = tyro.cli(
        options,
        args=words[1:],
        prog=f"trimtab train {name}",
        description=line,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    result = train(recipe, folder, _show(recipe.batch_size))
    print(f"{result.status} after {result.steps} steps: test accuracy {result.accuracy:.4f}")
    print(f"run folder: {folder}")
    return 0


def _show(batch_size: int) -> Callable[["Progress"], None]:
    """A callback that prints a line for every logged step, and each alarm once."""
    told = 0

    def show(now: "Progress") -> None:
        nonlocal told
        speed = now.step / max(now.seconds, 1e-9)  # steps/s
        parts = [f"step {now.step}/{now.steps}", f"loss {now.loss:.4f}", f"lr {now.lr:.3g}"]
        if now.accuracy is not None:
            parts.append(f"accuracy {now.accuracy:.4f}")
        if now.entropy_min is not None and math.isfinite(now.entropy_min):
            parts.append(f"lowest entropy {now.entropy_min:.3f}")
        parts.append(f"{speed * batch_size:,.0f} samples/s")
        parts.append(f"{(now.steps - now.step) / speed:.0f} s left")
        print("  ".join(parts), flush=True)
        for message in now.alarms[told:]:
            print(f"  alarm: {message}", flush=True)
        told = len(now.alarms)

    return show


def _unknown(kind: str, word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {word!r}.{hint} There are: {', '.join(known)}"


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
