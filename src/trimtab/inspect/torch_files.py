"""Files of `torch.save`, read with `weights_only=True`: tensors and plain values, and nothing in them is ever run."""

import argparse
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import CheckpointError
from trimtab.inspect.stored import Checkpoint, Entry, reader

# Where training scripts put the model among other things, in the order in which they are looked for.
_MODEL_KEYS = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "ema",
    "ema_state_dict",
)
# What is never the model; matched at the beginning of a key, in lower case.
_NOT_THE_MODEL = ("optim", "opt_", "lr_", "sched", "scaler", "grad_scaler", "rng", "random", "loops", "callbacks")
# What training scripts save beside the weights and what only holds values: arguments, and NumPy's scalars, whose module
# had another name before NumPy 2.
_DTYPES = ("bool", "int32", "int64", "float32", "float64")
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in _DTYPES),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
]


def open_torch(paths: Sequence[Path], key: str | None) -> Checkpoint:
    """Open the files that together hold one checkpoint.

    Args:
        paths: the files.
        key: where the state dict is in each, dotted ("model", "state.ema"); None to look for it.

    Raises:
        CheckpointError: a file is damaged, holds more than tensors and plain values, or has nothing at `key`.
    """
    entries: dict[str, Entry] = {}
    files: dict[str, Path] = {}
    mappable = all(map(_is_zip, paths))
    content: Any = {}
    chosen = ""
    whole: dict[str, Tensor] = {}
    for path in paths:
        content = _load(path, mappable)
        chosen, state = _find(content, key, path)
        tensors = dict(_tensors(state))
        entries |= {name: _entry(tensor) for name, tensor in tensors.items()}
        files |= dict.fromkeys(tensors, path)
        whole |= {} if mappable else tensors
        del state, tensors
    load: Callable[[str], Tensor]
    notes: tuple[str, ...] = ()
    if mappable:
        load = reader(files, {name: entry.size for name, entry in entries.items()}, lambda path: _map(path, chosen))
    else:
        load = whole.__getitem__
        notes = ("The file is of torch's old format, which can only be read whole: it is held in memory.",)
    kind = "torch" if mappable else "torch, old format"
    kind += "" if len(paths) == 1 else f" in {len(paths)} shards"
    first = chosen.split(".")[0]
    beside = content if isinstance(content, Mapping) and chosen else {}
    left_out = tuple(str(name) for name, value in beside.items() if str(name) != first and _has_tensors(value))
    facts = {str(name): value for name, value in _plain(content).items()}
    return Checkpoint(kind, entries, load, chosen, left_out, facts, notes)


def _load(path: Path, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")  # about old storages, which are no concern of the reader
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from None
    except Exception as error:  # a damaged pickle raises whatever it runs into
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript archive, which holds code beside its tensors; nothing of it was run. Load it "
                "yourself and save its state_dict() alone"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise CheckpointError(f"{path} is damaged or no checkpoint of torch.save ({reason}): copy it again") from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refusal(path: Path, error: Exception) -> str:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            asks = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of another format, or a damaged one
        asks = []
    if not asks:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it cannot be parsed"
        return f"{path} is damaged or holds more than tensors ({reason}): nothing of it was run. Copy it again"
    named = ", ".join(sorted(asks)[:3]) + (", ..." if len(asks) > 3 else "")
    return (
        f"{path} holds more than tensors: it asks for {named}, which would mean to run its code. It was refused and "
        "nothing of it was run. Where you trust it, load it yourself and save the model's state_dict() alone"
    )


def _map(path: Path, key: str) -> Callable[[str], Tensor]:
    return dict(_tensors(_walk(_load(path, True), key, path))).__getitem__


def _find(content: Any, key: str | None, path: Path) -> tuple[str, Any]:
    """Return where the state dict is, dotted, and the state dict."""
    if isinstance(content, Tensor):
        return "", {"tensor": content}
    if key is not None:
        return key, _walk(content, key, path)
    steps: list[str] = []
    while isinstance(content, Mapping):
        inner = {str(name): value for name, value in content.items() if not isinstance(value, Tensor)}
        likely = {name: value for name, value in inner.items() if isinstance(value, Mapping) and _has_tensors(value)}
        likely = {name: value for name, value in likely.items() if not name.lower().startswith(_NOT_THE_MODEL)}
        named = next((name for name in _MODEL_KEYS if name in likely), None)
        bare = any(isinstance(value, Tensor) and value.is_floating_point() for value in content.values())
        if named is None and len(likely) == 1 and not bare:
            named = next(iter(likely))
        if named is None:
            break
        steps.append(named)
        content = likely[named]
    return ".".join(steps), content


def _walk(content: Any, key: str, path: Path) -> Any:
    """Return what is at a dotted key; names with dots in them are found too."""
    if not key:
        return content if not isinstance(content, Tensor) else {"tensor": content}
    known = {str(name): value for name, value in content.items()} if isinstance(content, Mapping) else {}
    for name, value in known.items():
        if key == name or key.startswith(name + "."):
            return _walk(value, key[len(name) + 1 :], path)
    offered = ", ".join(name for name, value in known.items() if _has_tensors(value)) or "none"
    raise CheckpointError(f"{path} has nothing at --key {key}: the keys with tensors there are {offered}")


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor below `content` with its dotted name; optimiser state and the like are passed over."""
    if isinstance(content, Tensor):
        yield prefix, content
        return
    inner = content.items() if isinstance(content, Mapping) else enumerate(content) if _is_list(content) else ()
    for name, value in inner:
        if isinstance(value, Tensor) or not str(name).lower().startswith(_NOT_THE_MODEL):
            yield from _tensors(value, f"{prefix}.{name}" if prefix else str(name))


def _has_tensors(content: Any) -> bool:
    if isinstance(content, Mapping):
        return any(map(_has_tensors, content.values()))
    return isinstance(content, Tensor) or (_is_list(content) and any(map(_has_tensors, content)))


def _is_list(content: Any) -> bool:
    return isinstance(content, list | tuple)


def _plain(content: Any) -> Mapping[Any, Any]:
    return {k: v for k, v in content.items() if not _has_tensors(v)} if isinstance(content, Mapping) else {}


def _entry(tensor: Tensor) -> Entry:
    unread = ""
    if tensor.is_meta:
        unread = "it has no values (meta device)"
    elif tensor.is_quantized:
        unread = "quantised"
    elif tensor.layout != torch.strided:
        unread = f"of layout {tensor.layout}"
    size = 0 if unread else tensor.numel() * tensor.element_size()
    return Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), size, unread)
