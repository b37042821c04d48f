"""What every kind of checkpoint is turned into: names, shapes and dtypes now, the tensors one at a time later."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

# The pages of a mapped file stay in memory as long as the mapping lives, so it is made anew after this much was read.
_REMAP_AFTER = 2**23  # bytes


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, not read yet.

    Attributes:
        shape: as stored.
        dtype: its name, as torch has it where torch has it.
        size: bytes.
        unread: why its values cannot be read; "" if they can.
    """

    shape: tuple[int, ...]
    dtype: str
    size: int
    unread: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        kind: the format, in words.
        entries: what is in it, by name.
        load: reads one tensor. Let go of it before the next is read: it may keep a mapped file open.
        key: the part of the file that was taken for the model's state dict, dotted; "" for all of it.
        left_out: the names beside it that were left out.
        facts: plain values found beside the tensors, for instance the model's arguments.
        notes: what the reader should know, one sentence each.
    """

    kind: str
    entries: Mapping[str, Entry]
    load: Callable[[str], Tensor]
    key: str = ""
    left_out: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def reader(
    files: Mapping[str, Path], sizes: Mapping[str, int], map_file: Callable[[Path], Callable[[str], Tensor]]
) -> Callable[[str], Tensor]:
    """Return a function that reads one tensor by name and never keeps more than a little of any file mapped.

    Args:
        files: where each tensor lies.
        sizes: the bytes of each.
        map_file: opens a file and returns a function that gives its tensors by name.
    """
    path: Path | None = None
    tensors: Callable[[str], Tensor] | None = None
    read = 0

    def load(name: str) -> Tensor:
        nonlocal path, tensors, read
        if tensors is None or path != files[name] or read > _REMAP_AFTER:
            tensors = None  # one is closed before the next is opened
            path, tensors, read = files[name], map_file(files[name]), 0
        read += sizes[name]
        return tensors(name)

    return load
