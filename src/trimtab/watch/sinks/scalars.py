"""What sinks draw: a line of the log as flat, named numbers, and the heads as distributions."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from trimtab.watch.alarms import Head, Reading

_NOT_DRAWN = ("step", "alarms")  # the axis, and what is text


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Flatten a line of the log into named numbers.

    A number keeps its name, the entries of a mapping are called "name/key", and those of a list of several
    "name/0", "name/1" ...; a list of one is that one. So the sigma of a plain weight is "sigma/blocks.0.mlp.0", and
    those of a fused one "sigma/blocks.0.qkv/0" to "/2". Text is left out; "alarms" is the number of alarms raised.

    Args:
        line: one logged step, as `Watch` hands it to a sink or as `read_run` reads it back.

    Returns:
        The numbers in the order of the line, those that are not finite included.
    """
    flat: dict[str, float] = {}
    for name, value in line.items():
        if name not in _NOT_DRAWN:
            _flatten(name, value, flat)
    if "alarms" in line:
        flat["alarms"] = float(len(line["alarms"]))
    return flat


def head_values(readings: Mapping[Head, Reading]) -> dict[str, list[float]]:
    """The heads' numbers as distributions: "heads/entropy_normalized" (0 to 1) and "heads/max_logit".

    Numbers that are not finite are left out, and so is a distribution without any number.
    """
    values = {
        "heads/entropy_normalized": [reading.normalized for reading in readings.values()],
        "heads/max_logit": [reading.max_logit for reading in readings.values()],
    }
    finite = {name: [value for value in numbers if math.isfinite(value)] for name, numbers in values.items()}
    return {name: numbers for name, numbers in finite.items() if numbers}


def _flatten(name: str, value: Any, flat: dict[str, float]) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _flatten(f"{name}/{key}", entry, flat)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _flatten(name if len(value) == 1 else f"{name}/{index}", entry, flat)
    elif isinstance(value, Real) or value in ("nan", "inf", "-inf"):
        flat[name] = float(value)
