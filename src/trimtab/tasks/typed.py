"""Plain values, as JSON gives them, back into frozen dataclasses: every field known and of its type."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trimtab.errors import RecipeError
from trimtab.words import nearest

_NOT_FINITE = {"nan", "inf", "-inf"}  # what a log writes for floats that JSON cannot hold
_WORDS: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
    type(None): "None",
    None: "None",
}


def typed(cls: Any, value: object, where: str = "") -> Any:
    """Turn plain values into what a type annotation asks for.

    Args:
        cls: a dataclass, bool, int, float, str, None, Any, Literal, a union, or tuple, list and dict of such.
        value: what JSON gave: lists for tuples, dicts for dataclasses, "inf" for a float without end.
        where: the name of the field, dotted, for the errors.

    Returns:
        An instance of `cls`. An int is accepted for a float, and nothing else for another.

    Raises:
        RecipeError: a field is unknown (the nearest is named), missing, or of another type.
    """
    if is_dataclass(cls):
        return _dataclass(cls, value, where)
    origin, arguments = get_origin(cls), get_args(cls)
    if origin in (Union, types.UnionType):
        return _union(cls, value, where)
    if origin is Literal:
        # 1 == True, so the type counts as well
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        choices = [str(choice) for choice in arguments]
        raise RecipeError(f"{where} must be one of {', '.join(choices)}; got {value!r}.{nearest(str(value), choices)}")
    if origin is tuple and isinstance(value, list | tuple):
        return _tuple(cls, value, where)
    if origin is list and isinstance(value, list | tuple):
        return [typed(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {
            typed(arguments[0], key, f"{where} key"): typed(arguments[1], item, f"{where}[{key!r}]")
            for key, item in value.items()
        }
    return _plain(cls, value, where)


def _dataclass(cls: Any, value: object, where: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where or cls.__name__} must be the fields of a {cls.__name__}; got {value!r}")
    known = {field.name: field for field in fields(cls)}
    for name in value:
        if name not in known:
            raise RecipeError(f"unknown field {_dotted(where, name)!r} of {cls.__name__}.{nearest(str(name), known)}")
    for name, field in known.items():
        if name not in value and field.init and field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(f"{_dotted(where, name)} is missing: {cls.__name__} has no default for it")
    hints = get_type_hints(cls)
    given = [(name, item) for name, item in value.items() if known[name].init]  # others make themselves
    return cls(**{name: typed(hints[name], item, _dotted(where, name)) for name, item in given})


def _union(cls: Any, value: object, where: str) -> Any:
    """The first member that takes the value; an exact type comes before a float that takes an int."""
    members = sorted(get_args(cls), key=lambda member: member is not type(value))
    reasons = []
    for member in members:
        try:
            return typed(member, value, where)
        except RecipeError as error:
            reasons.append((member, error))
    kept = [(member, error) for member, error in reasons if member is not type(None)]
    if len(kept) == 1 and value is not None and is_dataclass(kept[0][0]):
        raise kept[0][1]  # which of its fields is wrong says more than that the whole is
    raise RecipeError(f"{where} must be {_name(cls)}; got {value!r}")


def _tuple(cls: Any, value: list[Any] | tuple[Any, ...], where: str) -> tuple[Any, ...]:
    arguments = get_args(cls)
    if len(arguments) == 2 and arguments[1] is ...:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise RecipeError(f"{where} must have {len(arguments)} values; got {len(value)}: {value!r}")
    return tuple(
        typed(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _plain(cls: Any, value: object, where: str) -> Any:
    if cls is Any:
        return value
    if cls is float and not isinstance(value, bool):
        if isinstance(value, int | float) or (isinstance(value, str) and value in _NOT_FINITE):
            return float(value)
    elif cls is None or cls is type(None):
        if value is None:
            return None
    elif get_origin(cls) not in (tuple, list, dict) and cls not in _WORDS:
        raise RecipeError(
            f"{where} is declared as {_name(cls)}, which a run.json cannot hold: declare it as bool, int, float, str, "
            "None, Literal[...], tuple[...], list[...], dict[...], a union of such or a dataclass of such"
        )
    elif type(value) is cls:  # a bool is no int here
        return value
    raise RecipeError(f"{where} must be {_name(cls)}; got {value!r}")


def _name(cls: Any) -> str:
    """How a type is told to a person: "a number or None"."""
    if get_origin(cls) in (Union, types.UnionType):
        return " or ".join(_name(member) for member in get_args(cls))
    if get_origin(cls) is Literal:
        return ", ".join(map(str, get_args(cls)))
    if get_origin(cls) is not None:
        return str(cls)
    return _WORDS.get(cls, getattr(cls, "__name__", str(cls)))


def _dotted(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)
