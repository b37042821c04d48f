"""The command line: a table of commands, and how their errors are told.

Heavy imports wait until a command needs them. An error that a user can act on is one line on stderr and exit code 2.
"""

import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.words import WordsError, nearest, parse_words


@dataclass(frozen=True)
class _Command:
    usage: str
    line: str
    place: str
    """Module and function: it takes the words that follow, and returns the exit code."""


_COMMANDS = {
    "demo": _Command("", "the whole story in about a minute, on real images, offline", "trimtab.cli:_demo"),
    "train": _Command(
        "NAME ...",
        "train one recipe, watched; goes on where it was stopped",
        "trimtab.train.train_command:train_command",
    ),
    "compare": _Command(
        "NAME ...",
        "stabilizers side by side, over learning rates and seeds",
        "trimtab.train.compare.command:compare_command",
    ),
    "recipes": _Command("", "the recipes, with one line each", "trimtab.train.train_command:recipes_command"),
    "report": _Command("FOLDER ...", "runs as one page that opens offline", "trimtab.report.command:report_command"),
    "watch": _Command(
        "FOLDER", "a run in the terminal, live while it goes on", "trimtab.report.terminal:watch_command"
    ),
    "generate": _Command("RUN", "text from a trained language model", "trimtab.use.generate:generate_command"),
    "translate": _Command("RUN", "lines through a trained model", "trimtab.use.translate:translate_command"),
    "transcribe": _Command(
        "RUN FILE", "recordings to text, by a trained speech model", "trimtab.use.transcribe:transcribe_command"
    ),
    "forecast": _Command(
        "DATA ...", "the next steps of a CSV file, by a trained model", "trimtab.use.forecast:forecast_command"
    ),
    "inspect": _Command(
        "FILE",
        "spectral norms, stable ranks, TEV of any checkpoint",
        "trimtab.inspect.command:inspect_command",
    ),
    "data": _Command("list|get|check", "data sets by name, with checksums", "trimtab.tasks.data.command:data_command"),
}

_EXTRAS = {
    **dict.fromkeys(
        (
            "PIL",
            "jiwer",
            "kaldi_native_fbank",
            "lightning_fabric",
            "matplotlib",
            "narwhals",
            "plotly",
            "pyarrow",
            "rich",
            "sacrebleu",
            "safetensors",
            "soundfile",
            "tokenizers",
            "tyro",
        ),
        "lab",
    ),
    "ray": "ray",
}
"""Which extra brings an optional library."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `trimtab`; those of the process by default.

    Returns:
        The exit code: 0 when all went well, 1 when what was asked for was done and found wanting (a compare with
        failed runs, damaged data), 2 for an error the user can act on, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × or σ shows ? instead of ending the run
    try:
        code = _run(words)
        sys.stdout.flush()  # what cannot be written is found out here, not when Python ends
        return code
    except SystemExit as end:  # tyro has printed its help, or a recipe's own file has had enough
        return _fail(end.code) if isinstance(end.code, str) else end.code or 0
    except KeyboardInterrupt:
        print("stopped; what was written until now is kept", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in _EXTRAS:
            raise
        return _fail(f"this command needs {library}: pip install 'trimtab[{_EXTRAS[library]}]'")
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
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        from trimtab import __version__

        print(f"trimtab {__version__}")
        return 0
    if name not in _COMMANDS:
        raise WordsError(f"unknown command {name}.{nearest(name, _COMMANDS)} There are: {', '.join(_COMMANDS)}")
    module, _, function = _COMMANDS[name].place.partition(":")
    command: Callable[[list[str]], int] = getattr(import_module(module), function)
    return command(rest)


def _usage() -> str:
    lines = [f"  {name + ' ' + command.usage:<20}{command.line}" for name, command in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: trimtab COMMAND ...",
            "",
            "Keeps Transformer training stable: watch instability coming, steady it, compare the cures.",
            "",
            "commands:",
            *lines,
            "",
            "  trimtab COMMAND --help tells a command's options, trimtab --version the version.",
        ]
    )


def _demo(words: list[str]) -> int:
    options = parse_words(_DemoOptions, words, prog="trimtab demo")

    from trimtab.demo import demo

    demo(options.folder, open_page=options.open)
    return 0


@dataclass(frozen=True)
class _DemoOptions:
    """One small Transformer, plain and steadied, on real digits: a live table, then a page to open in a browser."""

    folder: Path = Path("runs/demo")
    """Where the runs and the page go; an earlier demo there is replaced."""

    open: bool = False
    """Open the page in the browser at the end."""


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
