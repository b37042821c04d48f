"""From the words of a command line to typed options: tyro does it, and an error is one line.

Like `trimtab.errors` it imports nothing else of the house, so that every command can use it.
"""

import contextlib
import difflib
import io
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar

from trimtab.errors import TrimtabError

T = TypeVar("T")

_KINDS = {float: "a number", int: "a whole number", str: "text", bool: "no value", type(None): "None"}


class WordsError(TrimtabError):
    """A word on the command line is unknown, missing or of the wrong kind."""


def parse_words(kind: type[T], words: Sequence[str], *, prog: str, description: str | None = None) -> T:
    """Fill a dataclass from words such as ``--lr 0.1 --model.depth 3``.

    Args:
        kind: the dataclass; a field that is a dataclass itself has its fields under its own name and a dot.
        words: what the person typed.
        prog: the command, for its help.
        description: one line for its help; the dataclass's docstring by default.

    Raises:
        WordsError: a field is unknown (the nearest right one is named), missing or ill-typed.
        SystemExit: help was asked for and has been printed.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options, strange = tyro.cli(
                kind, args=list(words), prog=prog, description=description, return_unknown_args=True
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise WordsError(_one_line(said.getvalue(), _flags(kind), words, prog)) from None
    print(said.getvalue(), end="", file=sys.stderr)
    if strange:
        raise WordsError(_strange(strange[0], _flags(kind), prog))
    return options


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint " Did you mean ...?", empty when nothing is near; "--dim" is near to "--model.dim"."""
    known = list(known)
    found = [name for name in known if name.rpartition(".")[2] == word.lstrip("-")]
    found = found or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


def _strange(word: str, known: Iterable[str], prog: str) -> str:
    """What to say of a word that is neither a field nor the value of one."""
    if not word.startswith("--"):
        near = nearest(f"-{word}", known) if word.startswith("-") else ""
        rule = "a field is given as --FIELD VALUE, a switch without value"
        return f"unexpected {word!r}: {rule}{f'.{near}' if near else f'; see {prog} --help'}"
    flag = word.partition("=")[0]
    return f"unknown field {flag}.{nearest(flag, known) or f' See {prog} --help'}"


def _one_line(box: str, known: dict[str, Any], words: Sequence[str], prog: str) -> str:
    """The heart of tyro's message: which field, what it takes and what came."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    parts = re.split(r"^╭.*$|^[\s│]*[─-]{3,}.*$", plain, flags=re.MULTILINE)  # without Unicode, rules are dashes
    text = " ".join(line.strip("│ ") for line in parts[min(1, len(parts) - 1)].splitlines()).strip()
    if text.startswith("Missing from"):  # what is required is told there with its help
        if unknown := next((word for word in words if _is_unknown(word, known)), None):
            return _strange(unknown, known, prog)  # most often a slip in the very field that is missed
        missing = re.findall(r"--[\w.-]+(?= [A-Z{])", text) or text.partition(f"{prog}: ")[2].split()[:1]
        return f"{prog} needs {' and '.join(missing)}; see {prog} --help"
    for flag in re.findall(r"--[\w.-]*\w", text):
        if flag in known:
            return f"{flag} must be {_expected(known[flag])}; got {_given(flag, words) or 'nothing'}"
    return re.sub(r"^Error parsing \S+: ", "", text)


def _is_unknown(word: str, known: dict[str, Any]) -> bool:
    flag = word.partition("=")[0].replace("_", "-")
    return flag.startswith("--") and flag not in known and f"--{flag.removeprefix('--no-')}" not in known


def _given(flag: str, words: Sequence[str]) -> str:
    """The words after the last such flag, up to the next flag."""
    values: list[str] = []
    inside = False
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            inside = name.replace("_", "-") == flag
            values = ([value] if equals else []) if inside else values
        elif inside:
            values.append(word)
    return " ".join(map(repr, values))


def _flags(kind: Any, prefix: str = "") -> dict[str, Any]:
    """The flags of a dataclass and of those in it: flag to type."""
    flags: dict[str, Any] = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, marks = hints[field.name], tuple[Any, ...]()
        if typing.get_origin(hint) is typing.Annotated:
            hint, marks = hint.__origin__, hint.__metadata__
        if is_dataclass(hint):
            bare = any(getattr(mark, "name", None) == "" for mark in marks)  # tyro.conf.arg(name="")
            flags |= _flags(hint, prefix if bare else f"{prefix}{field.name}.")
        else:
            flags[f"--{prefix}{field.name}".replace("_", "-")] = hint
    return flags


def _expected(hint: Any) -> str:
    """A type in words: "a number or None", "one of adam, sgd", "2 numbers"."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_expected, inner))
    if origin is tuple and Ellipsis not in inner and len(set(inner)) == 1:
        return f"{len(inner)} {_expected(inner[0]).removeprefix('a ')}s"
    return _KINDS.get(hint, f"a {getattr(hint, '__name__', hint)}".lower())
