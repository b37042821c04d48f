"""Folders of `torch.distributed.checkpoint`, read tensor by tensor in one process and without running their pickle.

The folder's `.metadata` is a pickle. It is parsed with inert stand-ins for every class it names, so that nothing of
it can run; each piece of a tensor is a small file of `torch.save`, read with `weights_only=True`.
"""

import io
import math
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import CheckpointError
from trimtab.inspect.stored import Checkpoint, Entry


def open_distributed(folder: Path) -> Checkpoint:
    """Open a folder written by `torch.distributed.checkpoint.save`.

    Raises:
        CheckpointError: its metadata cannot be read, or its pieces are missing.
    """
    try:
        metadata = _InertUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load().__dict__
        tensors = {
            str(name): (tuple(told.size), told.properties.state[0])
            for name, told in metadata["state_dict_metadata"].items()
            if hasattr(told, "size")
        }
        pieces: dict[str, list[Any]] = {name: [] for name in tensors}
        for place, stored in metadata["storage_data"].items():
            if place.fqn in tensors:
                pieces[place.fqn].append((tuple(place.offset), stored))
    except Exception:  # a damaged pickle raises whatever it runs into
        raise CheckpointError(
            f"{folder / '.metadata'} is damaged or of an unknown version: expected torch.distributed.checkpoint's"
        ) from None
    missing = {
        p.relative_path for found in pieces.values() for _, p in found if not (folder / p.relative_path).is_file()
    }
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of its files, for instance {sorted(missing)[0]}")

    entries = {}
    for name, (shape, dtype) in tensors.items():
        packed = any(getattr(stored, "transform_descriptors", None) for _, stored in pieces[name])
        unread = "compressed or encrypted" if packed else "" if isinstance(dtype, torch.dtype) else "of unknown dtype"
        size = math.prod(shape) * dtype.itemsize if isinstance(dtype, torch.dtype) else 0
        entries[name] = Entry(shape, str(dtype).removeprefix("torch."), size, unread)

    def load(name: str) -> Tensor:
        shape, dtype = tensors[name]
        read = ((offset, _piece(folder / s.relative_path, s.offset, s.length)) for offset, s in pieces[name])
        if len(pieces[name]) == 1:
            whole = next(read)[1]
            filled = whole.numel()
        else:
            whole, filled = _joined(read, torch.empty(shape, dtype=dtype))
        if whole.shape != shape or whole.dtype != dtype or filled != math.prod(shape):
            raise CheckpointError(f"{folder} is damaged: the pieces of {name} do not make what its metadata tell")
        return whole

    return Checkpoint("torch.distributed.checkpoint", entries, load)


def _joined(pieces: Iterable[tuple[tuple[int, ...], Tensor]], whole: Tensor) -> tuple[Tensor, int]:
    """Put the pieces into the whole, each at its offset; count the numbers that were put."""
    filled = 0
    for offset, piece in pieces:
        place = tuple(slice(start, start + length) for start, length in zip(offset, piece.shape, strict=False))
        if whole[place].shape == piece.shape:
            whole[place] = piece
            filled += piece.numel()
    return whole, filled


def _piece(path: Path, offset: int, length: int) -> Tensor:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            tensor = torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
    except Exception:  # a damaged pickle raises whatever it runs into
        raise CheckpointError(f"{path} is damaged, or holds more than tensors; nothing of it was run") from None
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{path} holds a {type(tensor).__name__} where a tensor was expected")
    return tensor


class _Inert:
    """Stands in for any class of a pickle: takes arguments and state, does nothing with them."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _InertUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing and calls nothing but `_Inert`, `tuple` and `dict`."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            if name == "Size":
                return tuple
            dtype = getattr(torch, name, None)
            if isinstance(dtype, torch.dtype):
                return dtype
        return dict if (module, name) == ("collections", "OrderedDict") else _Inert
