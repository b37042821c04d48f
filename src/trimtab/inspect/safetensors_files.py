"""Safetensors files: one, or the shards of one checkpoint."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.errors import CheckpointError
from trimtab.inspect.stored import Checkpoint, Entry, reader

# The format's names for the dtypes that torch reads as they are, with the bytes of one number.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


def open_safetensors(paths: Sequence[Path]) -> Checkpoint:
    """Open the files that together hold one checkpoint.

    Raises:
        CheckpointError: one of them is damaged or no safetensors file.
    """
    entries: dict[str, Entry] = {}
    files: dict[str, Path] = {}
    marks: dict[str, str] = {}
    for path in paths:
        with _open(path) as file:
            marks |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - it is no dict
                piece = file.get_slice(name)
                shape, code = tuple(piece.get_shape()), piece.get_dtype()
                dtype, width = _DTYPES.get(code, (code, 0))
                unread = "" if code in _DTYPES else f"{code} is packed or unknown to this reader"
                entries[name] = Entry(shape, dtype, width * math.prod(shape), unread)
                files[name] = path
    kind = "safetensors" if len(paths) == 1 else f"safetensors in {len(paths)} shards"
    load = reader(files, {name: entry.size for name, entry in entries.items()}, _map)
    return Checkpoint(kind, entries, load, facts=marks)


def _map(path: Path) -> Callable[[str], Tensor]:
    tensor: Callable[[str], Tensor] = _open(path).__enter__().get_tensor  # the file is closed with its last reference
    return tensor


def _open(path: Path) -> AbstractContextManager[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        file: AbstractContextManager[Any] = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}): copy or download it again"
        ) from None
    return file
