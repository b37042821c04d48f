"""A nest of tensors and plain values, taken apart into JSON and named tensors, and put together again."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from trimtab.errors import CheckpointError

_TENSOR, _TUPLE = "<tensor>", "<tuple>"


def pack(value: Any, path: str, put: Callable[[str, Tensor], None]) -> Any:
    """The nest as values that JSON can hold; each tensor is handed to `put` under its path in the nest.

    Raises:
        CheckpointError: the nest holds something else than tensors, numbers, text, lists, tuples and dicts by name.
    """
    if isinstance(value, Tensor):
        put(path, value)
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise CheckpointError(f"{path} cannot be saved: expected a dict with names as keys, got {list(value)[:3]}")
        return {name: pack(entry, f"{path}.{name}", put) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [pack(entry, f"{path}.{i}", put) for i, entry in enumerate(value)]
        return {_TUPLE: entries} if isinstance(value, tuple) else entries
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"{path} cannot be saved: expected tensors and plain values, got {type(value).__name__}")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nest that `pack` took apart.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(packed, list):
        return [unpack(entry, tensors) for entry in packed]
    if not isinstance(packed, dict):
        return packed
    if packed.keys() == {_TENSOR}:
        return tensors[packed[_TENSOR]]
    if packed.keys() == {_TUPLE}:
        return tuple(unpack(entry, tensors) for entry in packed[_TUPLE])
    return {name: unpack(entry, tensors) for name, entry in packed.items()}
