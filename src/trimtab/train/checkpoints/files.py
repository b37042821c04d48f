"""The files of checkpoints: each is a folder, written aside and renamed, with a checksum of every file in it."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.errors import CheckpointError

FORMAT = "trimtab.1"
CHECKPOINTS = "checkpoints"
_CONTENT = "state.json"
_PART = ".part"
_STEP = re.compile(r"step-(\d{8,})")
_CHUNK = 2**22


class DamagedError(CheckpointError):
    """A checkpoint is not what was written: cut off, or with other bytes in it."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"the checkpoint {path} is damaged: {why}; use an earlier one")

    def __reduce__(self) -> Any:  # another process, which is told of it, has the message alone
        return CheckpointError, self.args


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint by its name; None of anything else."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def in_order(checkpoints: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, oldest first."""
    found = {step_of(path): path for path in checkpoints.iterdir()} if checkpoints.is_dir() else {}
    return [found[step] for step in sorted(step for step in found if step is not None)]


def write_checkpoint(path: Path, files: Mapping[str, Mapping[str, Tensor]], content: Mapping[str, Any]) -> None:
    """Write a checkpoint aside, flush it to the disk and rename it: its name never stands for half of one.

    Args:
        path: the folder it becomes; one that is there is replaced.
        files: tensors by name, by file name.
        content: what else there is to know, in plain values.

    Raises:
        CheckpointError: it cannot be written (a full disk); older checkpoints are as they were.
    """
    needed = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    aside = path.with_name(path.name + _PART)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, tensors in files.items():
            # One entry of metadata: several are written in any order, and a run done again would make other files.
            save_file(_in_memory_of_its_own(tensors), aside / name, {"format": FORMAT})
        sealed = dict(content) | {"format": FORMAT, "files": {name: _seal(aside / name) for name in files}}
        # NaN and inf stay what they are: Python's own reader takes them back. The text holds its own checksum.
        text = json.dumps(sealed)
        (aside / _CONTENT).write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "content": sealed}))
        for written in (*aside.iterdir(), aside):
            sync(written)
        remove(path)
        aside.rename(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the checkpoint {path} ({error}). It needs {needed / 1e6:,.1f} MB: make room, or keep fewer "
            "checkpoints; the older ones are as they were"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint; killed on the way, it leaves nothing that has the name of one."""
    if path.exists():
        aside = path.with_name(f"{path.name}.old{_PART}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside)


def remove_parts(checkpoints: Path) -> None:
    """Remove what writers that were killed have left behind."""
    for path in checkpoints.glob(f"step-*{_PART}"):
        shutil.rmtree(path, ignore_errors=True)


def read_content(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not (path / _CONTENT).is_file():
        if path.is_dir():
            raise DamagedError(path, "state.json is missing")
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        sealed = json.loads((path / _CONTENT).read_bytes())
        content, checksum = dict(sealed["content"]), sealed["crc32"]
    except (ValueError, KeyError, TypeError):
        raise DamagedError(path, "state.json is not what was written") from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if zlib.crc32(json.dumps(content).encode()) != checksum:
        raise DamagedError(path, "state.json is not what was written")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected the format {FORMAT!r}, got {content.get('format')!r}: use a newer trimtab"
        )
    return content


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What `write_checkpoint` was given, after every checksum was found right.

    The tensors are mapped, not read: they cost no memory before they are used, and are not to be kept.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    content = verify(path)
    try:
        return content, {name: load_file(path / name) for name in content["files"]}
    except (OSError, SafetensorError) as error:
        raise DamagedError(path, str(error)) from None


def verify(path: Path) -> dict[str, Any]:
    """Read all of a checkpoint and compare it with its checksums; return what it says beside its tensors.

    Raises:
        DamagedError: it is not what was written.
        CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    content = read_content(path)
    for name, seal in content["files"].items():
        try:
            found = _seal(path / name)
        except FileNotFoundError:
            raise DamagedError(path, f"{name} is missing") from None
        except OSError as error:
            raise _unreadable(path, error) from error
        if found["bytes"] != seal["bytes"]:
            raise DamagedError(path, f"{name} has {found['bytes']:,} bytes of {seal['bytes']:,}")
        if found != seal:
            raise DamagedError(path, f"{name} is not what was written")
    return content


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # there a folder cannot be opened
    number = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _seal(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file: 2.8 GB/s where SHA-256 makes 1.8, and it is accidents that it has to find."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return {"bytes": size, "crc32": checksum}


def _in_memory_of_its_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the format wants them: contiguous and without sharing, so that a tied weight is written twice."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone().contiguous() if memory in seen or not tensor.is_contiguous() else tensor
        seen.add(memory)
    return found


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"the checkpoint {path} cannot be read: {error.strerror or error}")
