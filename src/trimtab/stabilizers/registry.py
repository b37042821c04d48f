"""The stabilizers by name, and how a spec such as "sigma:gamma_init=one+qk-norm" is read."""

import re
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import TypeVar

from trimtab.errors import RecipeError
from trimtab.stabilizers.options import nearest, read_options, write_options
from trimtab.stabilizers.stabilizer import Stabilizer

STABILIZERS: dict[str, type[Stabilizer]] = {}
"""Name to class, in the order they were registered."""

Spec = str | Stabilizer | Sequence[Stabilizer]
"""Which stabilizers are meant: ``name[:option=value]...[+name...]``, or the stabilizers themselves."""

StabilizerT = TypeVar("StabilizerT", bound=Stabilizer)


def register(name: str) -> Callable[[type[StabilizerT]], type[StabilizerT]]:
    """Add a frozen dataclass, a subclass of `Stabilizer`, under a name: ``@register("my-own")``.

    Args:
        name: lower-case words joined by "-".

    Returns:
        A decorator of the class.

    Raises:
        ValueError: the name is none, or taken by another class.
        TypeError: what is decorated is no dataclass derived from `Stabilizer`.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(f"a stabilizer's name is of lower-case letters, digits and single hyphens; got {name!r}")

    def add(cls: type[StabilizerT]) -> type[StabilizerT]:
        if not (isinstance(cls, type) and issubclass(cls, Stabilizer) and "__dataclass_fields__" in cls.__dict__):
            raise TypeError(f"{name}: expected a dataclass derived from Stabilizer: put @dataclass(frozen=True) below")
        known = STABILIZERS.get(name)
        # the same file read again, in a notebook or by a command, brings a class of the same name
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        cls.name = name
        STABILIZERS[name] = cls
        return cls

    return add


def parse(spec: Spec) -> tuple[Stabilizer, ...]:
    """Return the stabilizers a spec names, in the order in which they are applied.

    Args:
        spec: "name" or "name:option=value", several joined by "+": "sigma:gamma_init=one:remove_norms=true+qk-norm".

    Returns:
        None for "none".

    Raises:
        RecipeError: a name or option is unknown (the nearest right one is told), a value is not of its option's type,
            one stabilizer is named twice, or nothing is named.
    """
    found = _read(spec) if isinstance(spec, str) else (spec,) if isinstance(spec, Stabilizer) else tuple(spec)
    for each in found:
        if not isinstance(each, Stabilizer) or not is_dataclass(each):
            raise RecipeError(f"expected the name of a stabilizer or a Stabilizer, got {each!r}")
        if not each.name:
            raise RecipeError(f'{type(each).__name__} has no name: put @register("its-name") above it')
        if each.name != "none" and sum(other.name == each.name for other in found) > 1:
            raise RecipeError(f"{each.name} is named twice in {spec!r}; give all its options at one place")
    return tuple(sorted((each for each in found if each.name != "none"), key=place_of))


def place_of(stabilizer: Stabilizer) -> tuple[int, str]:
    """Return what stabilizers are sorted by, whatever order they are named in."""
    return stabilizer.order, stabilizer.name


def spec_of(stabilizers: Sequence[Stabilizer]) -> str:
    """Return the words that `parse` reads as these stabilizers; "none" for none."""
    return "+".join(each.name + write_options(each) for each in stabilizers) or "none"


def _read(spec: str) -> tuple[Stabilizer, ...]:
    parts = re.split(r"\+(?=\s*[A-Za-z]|\s*$|\s*\+)", spec)  # not the plus of 1e+3
    return tuple(_read_one(part.strip(), spec) for part in parts)


def _read_one(part: str, spec: str) -> Stabilizer:
    name, *words = part.split(":")
    if not name:
        known = ", ".join(STABILIZERS)
        raise RecipeError(f"expected names of stabilizers joined by '+', got {spec!r}; there are {known}")
    cls = STABILIZERS.get(name)
    if cls is None:
        like = nearest(name, list(STABILIZERS))
        hint = f"; did you mean {like}?" if like else "."
        raise RecipeError(f"there is no stabilizer {name!r}{hint} There are {', '.join(STABILIZERS)}")
    return cls(**read_options(cls, words))
