import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from trimtab.errors import RecipeError
from trimtab.words import WordsError, nearest, parse_words


@dataclass(frozen=True)
class Inner:
    """What is inside.

    Attributes:
        dim: features.
        kind: of the model.
    """

    dim: int = 64
    kind: Literal["pre", "post"] = "pre"

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise RecipeError(f"dim must be at least 1, got {self.dim}")


@dataclass(frozen=True)
class Own:
    folder: Path | None = None


@dataclass(frozen=True)
class Words:
    """What a person types."""

    own: Annotated[Own, tyro.conf.arg(name="")] = Own()
    lr: float = 1e-3
    steps: int = 10
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    optimizer: Literal["adam", "sgd"] = "adam"
    watch_every: int = 5
    watch: bool = True
    name: str = "x"
    model: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Positional:
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The file."""


@dataclass(frozen=True)
class Required:
    lrs: str
    seeds: str = "3"


def parse(*words: str) -> Words:
    return parse_words(Words, words, prog="trimtab try")


def test_words_become_the_typed_fields() -> None:
    words = "--lr 3e-3 --clip 1 --betas 0.8 0.9 --no-watch --watch_every=2 --model.dim 32 --folder runs/a --name y"
    expected = Words(Own(Path("runs/a")), 3e-3, 10, 1.0, (0.8, 0.9), "adam", 2, False, "y", Inner(32))
    assert parse(*words.split()) == expected
    assert parse() == Words()
    assert parse("--clip", "None", "--watch").clip is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr abc", "--lr must be a number; got 'abc'"),
        ("--lr=abc", "--lr must be a number; got 'abc'"),
        ("--lr 1 --lr abc", "--lr must be a number; got 'abc'"),
        ("--lr", "--lr must be a number; got nothing"),
        ("--lr --steps 3", "--lr must be a number; got nothing"),
        ("--steps 1e3", "--steps must be a whole number; got '1e3'"),
        ("--watch_every x", "--watch-every must be a whole number; got 'x'"),
        ("--clip none", "--clip must be a number or None; got 'none'"),
        ("--betas 0.9", "--betas must be 2 numbers; got '0.9'"),
        ("--betas 0.9 x", "--betas must be 2 numbers; got '0.9' 'x'"),
        ("--optimizer adamm", "--optimizer must be one of adam, sgd; got 'adamm'"),
        ("--folder", "--folder must be a path or None; got nothing"),
        ("--model.dim x", "--model.dim must be a whole number; got 'x'"),
        ("--model.dim 0", "dim must be at least 1, got 0"),
        ("--lrr 3", "unknown field --lrr. Did you mean --lr?"),
        ("--lrr=3", "unknown field --lrr. Did you mean --lr?"),
        ("--dim 3", "unknown field --dim. Did you mean --model.dim?"),
        ("--model.dm 3", "unknown field --model.dm. Did you mean --model.dim?"),
        ("--watchevery 3", "unknown field --watchevery. Did you mean --watch-every?"),
        ("--qqq 3", "unknown field --qqq. See trimtab try --help"),
        (
            "--watch True",
            "unexpected 'True': a field is given as --FIELD VALUE, a switch without value; see trimtab try --help",
        ),
        (
            "-lr 3",
            "unexpected '-lr': a field is given as --FIELD VALUE, a switch without value. Did you mean --lr?",
        ),
        (
            "stray",
            "unexpected 'stray': a field is given as --FIELD VALUE, a switch without value; see trimtab try --help",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((WordsError, RecipeError)) as raised:
        parse(*words.split())
    assert str(raised.value) == message
    assert capfd.readouterr() == ("", "")


def test_a_required_field_is_named() -> None:
    with pytest.raises(WordsError) as raised:
        parse_words(Required, ["--seeds", "2"], prog="trimtab try")
    assert str(raised.value) == "trimtab try needs --lrs; see trimtab try --help"
    with pytest.raises(WordsError) as raised:
        parse_words(Positional, [], prog="trimtab try")
    assert str(raised.value) == "trimtab try needs FILE; see trimtab try --help"


def test_a_required_field_that_is_misspelt_is_an_unknown_one() -> None:
    with pytest.raises(WordsError) as raised:
        parse_words(Required, ["--lr", "0.1", "--seeds", "2"], prog="trimtab try")
    assert str(raised.value) == "unknown field --lr. Did you mean --lrs?"


def test_a_narrow_terminal_cuts_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    with pytest.raises(WordsError, match=r"^--optimizer must be one of adam, sgd; got 'a very long word indeed'$"):
        parse("--optimizer", "a very long word indeed")


def test_help_shows_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for part in ("What a person types", "--lr FLOAT", "--model.dim INT", "features", "64", "--folder", "{pre,post}"):
        assert part in shown, part


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("tran", " Did you mean train?"),
        ("qqq", ""),
        ("dim", " Did you mean model.dim?"),
    ],
)
def test_the_nearest_name(word: str, hint: str) -> None:
    assert nearest(word, ["train", "compare", "model.dim"]) == hint


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_whatever_the_terminal_can_draw(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The help library draws its boxes with other signs where there is no Unicode."""
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(WordsError) as raised:
        parse("--model.kind", "none")
    assert str(raised.value) == "--model.kind must be one of pre, post; got 'none'"
    with pytest.raises(WordsError) as raised:
        parse_words(Required, [], prog="trimtab try")
    assert str(raised.value) == "trimtab try needs --lrs; see trimtab try --help"
