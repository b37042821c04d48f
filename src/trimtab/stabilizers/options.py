"""The options of a stabilizer: read from words, checked against the types of its fields, written as words again."""

import difflib
import math
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from trimtab.errors import RecipeError

if TYPE_CHECKING:
    from trimtab.stabilizers.stabilizer import Stabilizer

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    NoneType: "none",
}


def read_options(cls: type["Stabilizer"], words: list[str]) -> dict[str, Any]:
    """Read ``name=value`` words as options of a stabilizer.

    Raises:
        RecipeError: a word is no such pair, names no option or one twice, or its value is none that the option's type
            allows.
    """
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]
    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise RecipeError(f"{cls.name}: expected option=value after the colon, got {word!r}")
        if name not in names:
            raise RecipeError(f"{cls.name} has no option {name!r}{_instead(name, names)}")
        if name in options:
            raise RecipeError(f"{cls.name}: option {name} is given twice")
        options[name] = _value(f"{cls.name}: {name}", text.strip(), hints[name])
    absent = [each.name for each in fields(cls) if not _has_default(each) and each.name not in options]
    if absent:
        raise RecipeError(f"{cls.name} needs a value for its option {absent[0]}: {cls.name}:{absent[0]}=...")
    return options


def check_options(stabilizer: "Stabilizer") -> None:
    """Raise a RecipeError if an option's value is none that its type allows."""
    cls = type(stabilizer)
    hints = get_type_hints(cls)
    for field in fields(stabilizer):
        value, kinds = getattr(stabilizer, field.name), _kinds(hints[field.name])
        if not any(_fits(value, kind) for kind in kinds):
            raise RecipeError(f"{cls.name or cls.__name__}: {field.name} must be {_described(kinds)}; got {value!r}")


def write_options(stabilizer: "Stabilizer") -> str:
    """Return ``:option=value`` for every option that is not at its default; `read_options` reads them back."""
    words = []
    for field in fields(stabilizer):
        value = getattr(stabilizer, field.name)
        if not _has_default(field) or value != field.default or type(value) is not type(field.default):
            words.append(f":{field.name}={_word(value)}")
    return "".join(words)


def described(cls: type["Stabilizer"]) -> dict[str, str]:
    """Return, for each option of a stabilizer, the values it takes, and its default if it has one."""
    hints = get_type_hints(cls)
    return {
        field.name: _described(_kinds(hints[field.name]))
        + (f"; {_word(field.default)} by default" if _has_default(field) else "")
        for field in fields(cls)
    }


def nearest(name: str, names: list[str]) -> str | None:
    """Return the name most like the one given, if any is like it."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), None)


def _instead(name: str, names: list[str]) -> str:
    if not names:
        return "; it has none"
    like = nearest(name, names)
    return (f"; did you mean {like}?" if like else ";") + f" It has {', '.join(names)}"


def has_defaults(cls: type["Stabilizer"]) -> bool:
    """Say whether a stabilizer can be made without naming any option."""
    return all(_has_default(field) for field in fields(cls))


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING


def _word(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Split the type of a field into its alternatives: words of a Literal, bool, int, float, str and None."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _kinds(part))
    return (hint,)


def _described(kinds: tuple[Any, ...]) -> str:
    parts = [
        ", ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else _WORDS.get(kind, str(kind))
        for kind in kinds
    ]
    return " or ".join(parts)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def _value(what: str, text: str, hint: Any) -> Any:
    kinds = _kinds(hint)
    for kind in kinds:
        for value in _readings(text, kind):
            if _fits(value, kind):
                return value
    raise RecipeError(f"{what} must be {_described(kinds)}; got {text!r}")


def _readings(text: str, kind: Any) -> list[Any]:
    """Return what a word may mean as a value of one kind: nothing, or one value."""
    if get_origin(kind) is Literal:
        return [value for value in get_args(kind) if _word(value) == text]
    if kind is NoneType:
        return [None] if text.lower() == "none" else []
    if kind is bool:
        return [{"true": True, "false": False}[text.lower()]] if text.lower() in ("true", "false") else []
    if kind in (int, float):
        try:
            return [kind(text)]
        except ValueError:
            return []
    return [text] if kind is str else []
