"""Arrays that are slow to make are made once and memory-mapped from then on, by every process on the machine."""

import hashlib
import json
import logging
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.tasks.data.folder import cache_folder

Arrays = dict[str, np.ndarray[Any, Any]]

_FORMAT = 1  # of the folder that is written here
_INDEX = "index.json"
_PATIENCE = 600  # seconds to wait for another process that prepares the same data

_log = logging.getLogger("trimtab")


def prepared(
    name: str,
    sources: Sequence[str],
    make: Callable[[], Mapping[str, np.ndarray[Any, Any]]],
    patience: float | None = None,
) -> Arrays:
    """Arrays from the cache, memory-mapped; made and kept there the first time.

    They are checked by size and checksum when they are opened, and made anew if damaged. Processes that come at the
    same time wait for the first. Where the cache cannot be written, the arrays stay in memory, with one warning.

    Args:
        name: what they are made of, for people who look into the cache.
        sources: what decides them: the checksums of the files, and a number that changes with `make`.
        make: makes them; called only if they are not there.
        patience: seconds to wait for another process that is at it; 600 by default.

    Returns:
        The arrays by name. Writing to them changes this process's copy only.
    """
    key = hashlib.sha256(json.dumps([_FORMAT, *sources]).encode()).hexdigest()[:16]
    folder = cache_folder() / "prepared" / f"{name}-{key}"
    found = _open(folder)
    if found is not None:
        return found

    from filelock import FileLock  # comes with torch

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"), timeout=patience or _PATIENCE).acquire()
    except (OSError, NotImplementedError) as error:  # read-only, never given back, or a file system without locks
        return _in_memory(folder, error, dict(make()))
    with lock:
        found = _open(folder)
        if found is not None:
            return found
        arrays = dict(make())
        try:
            _write(folder, arrays)
        except OSError as error:  # a full disk
            return _in_memory(folder, error, arrays)
        return _open(folder) or arrays


def _open(folder: Path) -> Arrays | None:
    """The arrays of a folder, or None if there are none that are whole."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        arrays = {}
        for name, (size, crc) in index.items():
            path = folder / f"{name}.npy"
            if path.stat().st_size != size or _crc32(path) != crc:
                raise ValueError(f"{path} is not what was written")
            arrays[name] = np.load(path, mmap_mode="c", allow_pickle=False)
        return arrays
    except FileNotFoundError:
        if (folder / _INDEX).exists():
            _log.warning("%s lacks a file; it is made anew", folder)
        return None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        _log.warning("%s is damaged (%s); it is made anew", folder, error)
        return None


def _write(folder: Path, arrays: Arrays) -> None:
    """Write aside, then rename: another process sees the whole folder or none."""
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    aside.mkdir()
    try:
        index = {}
        for name, array in arrays.items():
            path = aside / f"{name}.npy"
            with path.open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            index[name] = (path.stat().st_size, _crc32(path))
        (aside / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _crc32(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return zlib.crc32(content)


def _in_memory(folder: Path, error: Exception, arrays: Arrays) -> Arrays:
    _warn_once(f"{folder} cannot be written ({getattr(error, 'strerror', None) or error}); the data stay in memory")
    return arrays


@cache
def _warn_once(message: str) -> None:
    _log.warning("%s", message)
