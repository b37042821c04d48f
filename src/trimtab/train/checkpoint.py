"""Checkpoints: a model's tensors in one safetensors file, marked with a format and a step.

A file is written aside, flushed to the disk and renamed, so a name never stands for half a checkpoint.
"""

import os
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import nn

from trimtab.errors import CheckpointError

FORMAT = "trimtab.1"


def save_checkpoint(path: str | Path, model: nn.Module, step: int) -> None:
    """Write the model's state to `path`, in place of an older file of that name.

    Args:
        path: the file to write; its folder is made when missing.
        model: the model whose `state_dict` is saved.
        step: optimiser steps taken so far.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Each tensor in memory of its own: the format knows no sharing, and a tied weight is simply written twice.
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(state, metadata={"format": FORMAT, "step": str(step)})
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def load_checkpoint(path: str | Path, model: nn.Module) -> int:
    """Read a checkpoint back into a model of the same recipe.

    Args:
        path: a file that `save_checkpoint` wrote.
        model: takes the state; every name and shape must agree, or it is left as it was.

    Returns:
        Optimiser steps taken when it was saved.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it belongs to another model.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint ({error}); use an earlier one") from None
    if metadata.get("format") != FORMAT or not metadata.get("step", "").isdigit():
        raise CheckpointError(
            f"{path}: expected format {FORMAT!r} and a step, got {metadata}; use one written by train"
        )
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    saved = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != saved:
        name = min(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        raise CheckpointError(
            f"{path} belongs to another model: {name} is {saved.get(name, 'absent')} in the file and "
            f"{own.get(name, 'absent')} in the model; build the model from the run's own recipe"
        )
    model.load_state_dict(state)
    return int(metadata["step"])
