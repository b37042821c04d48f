"""Open any checkpoint: a file, the index of a sharded one, or a folder that holds one of these."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.errors import CheckpointError
from trimtab.inspect.distributed_files import open_distributed
from trimtab.inspect.safetensors_files import open_safetensors
from trimtab.inspect.stored import Checkpoint
from trimtab.inspect.torch_files import open_torch

# What a folder is searched for, best first.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin", "checkpoints/last.safetensors")
_SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}
_KNOWN = "safetensors, torch.save, an index of shards of either, or a torch.distributed.checkpoint folder"


def open_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: a safetensors file, a file of `torch.save`, the index of shards of either, or a folder with one of these;
            a `torch.distributed.checkpoint` folder; a run folder of Trimtab's, for its newest checkpoint.
        key: where the model's state dict is, for files that hold more. In a format of flat names, their beginning.

    Raises:
        CheckpointError: there is no such file, it is damaged or of another kind, it holds more than tensors, or it
            has nothing at `key`.
    """
    path = _resolve(Path(path))
    if path.is_dir():
        return _below(open_distributed(path), key, path)
    if path.name.endswith(".index.json"):
        shards = _shards(path)
        kinds = {_kind(shard) for shard in shards}
        if kinds == {"safetensors"}:
            return _below(open_safetensors(shards), key, path)
        if kinds == {"torch"}:
            return open_torch(shards, key)
        raise CheckpointError(f"the shards of {path} are of several kinds: expected safetensors or torch.save")
    if _kind(path) == "safetensors":
        return _below(open_safetensors([path]), key, path)
    return open_torch([path], key)


def _resolve(path: Path) -> Path:
    """The file to open: the path itself, or what a folder holds; a distributed checkpoint is a folder."""
    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    if not path.is_dir() or (path / ".metadata").is_file():
        return path
    for name in (*_INDEXES, *_SINGLE):
        if (path / name).is_file():
            return path / name
    saved = {_step(model): model for model in path.glob("checkpoints/step-*/model.safetensors")}
    if max(saved, default=-1) >= 0:
        return saved[max(saved)]
    found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES or file.name.endswith(".index.json"))
    indexes = [file for file in found if file.name.endswith(".index.json")]
    if len(found) == 1 or len(indexes) == 1:
        return (indexes or found)[0]
    if not found:
        raise CheckpointError(f"the folder {path} holds no checkpoint: expected {_KNOWN}")
    raise CheckpointError(f"the folder {path} holds several checkpoints: name one, for instance {found[0]}")


def _step(model: Path) -> int:
    """The step of a run's checkpoint by its folder; -1 of one that was never finished."""
    number = model.parent.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _kind(path: Path) -> str:
    """Tell the format by the first bytes, whatever the file is called."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if not head:
        raise CheckpointError(f"{path} is empty: copy or download it again")
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "torch"
    hint = " This is only a pointer that git-lfs left: fetch the file." if head == b"version h" else ""
    raise CheckpointError(f"{path} is no checkpoint of a known kind: expected {_KNOWN}.{hint}")


def _shards(index: Path) -> list[Path]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f'{index} is no index of shards: expected JSON with a "weight_map"') from None
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"{index} names {len(shards)} shards, of which {len(missing)} are missing ({named}): fetch them first"
        )
    return shards


def _below(checkpoint: Checkpoint, key: str | None, path: Path) -> Checkpoint:
    """Of a format of flat names, keep those below `key`, or those of the model where an optimiser is beside it."""
    groups = dict.fromkeys(name.split(".")[0] for name in checkpoint.entries)
    if key is None:
        optimizer = [group for group in groups if group.lower().startswith(("optim", "opt_"))]
        rest = [group for group in groups if group not in optimizer]
        key = rest[0] if optimizer and len(rest) == 1 else ""
    if not key:
        return checkpoint
    names = [name for name in checkpoint.entries if name.startswith(key + ".")]
    if not names:
        raise CheckpointError(f"{path} has nothing at --key {key}: its names begin with {', '.join(list(groups)[:8])}")
    return replace(
        checkpoint,
        entries={name.removeprefix(key + "."): checkpoint.entries[name] for name in names},
        load=lambda name: checkpoint.load(f"{key}.{name}"),
        key=key,
        left_out=tuple(group for group in groups if group != key.split(".")[0]),
    )
