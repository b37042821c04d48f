"""Checkpoints of a run: everything that the next step depends on, as `TrainState` lists it.

A checkpoint is a folder, checkpoints/step-00000200 of the run's, with the weights in model.safetensors (by their plain
names), the moving average, the state of the optimisers and of the random number generators beside it, and the rest in
state.json. Nothing in it is pickled. Tensors are whole, so that it loads on any number of processes.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import CheckpointError
from trimtab.reparam.carried import whole
from trimtab.train.checkpoints.files import (
    CHECKPOINTS,
    folder_of,
    read_checkpoint,
    remove_parts,
    sync,
    write_checkpoint,
)
from trimtab.train.checkpoints.kept import drop_others
from trimtab.train.checkpoints.model_state import (
    belongs_to_another,
    computed_names,
    load_model,
    parameter_names,
    plain_state,
    refuse_other,
)
from trimtab.train.checkpoints.optimizer_state import load_optimizer_state, optimizer_state, refuse_other_optimizer
from trimtab.train.checkpoints.packing import pack, unpack
from trimtab.train.randomness import random_states, restore_random_states, seed_new_process
from trimtab.train.state import Tensors, TrainState
from trimtab.watch.reduce import Ranks
from trimtab.watch.runlog import ARRAYS, STEPS

logger = logging.getLogger("trimtab")

_MODEL, _AVERAGE, _OPTIMIZER, _RANDOM, _OTHER = (
    f"{name}.safetensors" for name in ("model", "average", "optimizer", "rng", "other")
)


def save_checkpoint(folder: Path, state: TrainState, *, keep: int, best: bool) -> None:
    """Write a checkpoint of this step, and drop older ones; every process of the run must call it, the first writes.

    A disk that is full is an error that a run can live with: warn, train on and try again at the next checkpoint. The
    older checkpoints are then as they were, and what was begun is gone.

    Args:
        folder: the run's.
        state: what to save; it is not changed, and no random number is drawn.
        keep: how many of the last checkpoints stay, this one included.
        best: whether this step is the best that was saved so far; it stays as long as no better one comes. Its metrics
            are ``state.facts["metrics"]``.

    Raises:
        CheckpointError: it cannot be written, or something in the state is neither a tensor nor a plain value; on
            every process.
    """
    ranks = Ranks()
    files: dict[str, dict[str, Tensor]] = {}
    content = ranks.all_do(lambda: _collect(state, files, ranks.first))
    everyones = ranks.gather(random_states(_device(state.model)))
    files[_RANDOM] = {f"{rank}.{name}": tensor for rank, own in enumerate(everyones) for name, tensor in own.items()}
    content |= {"step": state.step, "best": best, "processes": len(everyones)}
    checkpoints = folder / CHECKPOINTS

    def write() -> None:
        remove_parts(checkpoints)
        for name in (STEPS, *ARRAYS):  # a machine that loses its power keeps the log up to here as well
            with suppress(OSError):
                sync(folder / name)
        write_checkpoint(folder_of(checkpoints, state.step), files, content)
        try:
            drop_others(checkpoints, state.step, keep)
        except OSError as error:  # this one is whole; the next save tries again
            logger.warning("older checkpoints in %s could not be dropped: %s", checkpoints, error)

    ranks.first_does(write)


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Give a run back everything it had at a checkpoint; every process of the run must call it.

    All is checked first: a checkpoint that is refused leaves model, optimisers and average as they were. The number of
    processes may be another than that which saved: processes it did not have get random states of their own.

    Args:
        path: the checkpoint's folder.
        state: made anew from the same recipe, with its Watch, if it has one, entered; it is filled in place.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it is that of another model, optimiser or
            recipe; on every process.
    """
    ranks = Ranks()
    names = parameter_names(state.model)
    content, files = ranks.all_do(lambda: read_checkpoint(path))  # before anything that processes do together

    def check() -> list[dict[str, Any]]:
        refuse_other(path, "model", plain_state(state.model), _model_state(content, files))
        own = {} if state.average is None else state.average.state_dict()
        refuse_other(path, "average", own, files.get(_AVERAGE, {}))
        optimizers: list[dict[str, Any]] = unpack(content["optimizers"], files.get(_OPTIMIZER, {}))
        if len(optimizers) != len(state.optimizers):
            raise belongs_to_another(
                path, "optimizers", f"it has {len(optimizers)} of them, here are {len(state.optimizers)}"
            )
        for optimizer, saved in zip(state.optimizers, optimizers, strict=True):
            try:
                refuse_other_optimizer(optimizer, saved, names)
            except CheckpointError as error:
                raise belongs_to_another(path, "optimizer", str(error)) from None
        for what in ("scaler", "watch"):
            if (content[what] is None) != (getattr(state, what) is None):
                has = "no" if content[what] is None else "a"
                raise belongs_to_another(path, "recipe", f"it has {has} {what}, here it is the other way round")
        return optimizers

    optimizers = ranks.all_do(check)
    others = files.get(_OTHER, {})
    load_model(state.model, _model_state(content, files))
    if state.average is not None:
        state.average.load_state_dict(files[_AVERAGE])
    for optimizer, saved in zip(state.optimizers, optimizers, strict=True):
        load_optimizer_state(optimizer, saved, names)
    if state.scaler is not None:
        state.scaler.load_state_dict(unpack(content["scaler"], others))
    if state.watch is not None:
        state.watch.load_state_dict(unpack(content["watch"], others))
    state.step, state.facts = content["step"], unpack(content["facts"], others)
    _restore_random(content, files[_RANDOM], ranks, _device(state.model))


def load_weights(path: Path, model: nn.Module, average: Tensors | None = None) -> int:
    """Load the weights of a checkpoint and nothing else; of a sharded model every process must call it.

    Into a converted model the weights of a plain one load too: gamma and the vectors are computed from them.

    Args:
        path: the checkpoint's folder.
        model: takes the weights; every name, shape and type must agree, or it is left as it was.
        average: takes the moving average, if given.

    Returns:
        Optimiser steps taken when it was saved.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it is that of another model.
    """
    ranks = Ranks()
    content, files = ranks.all_do(lambda: read_checkpoint(path))

    def check() -> None:
        refuse_other(path, "model", plain_state(model), _model_state(content, files), computed=computed_names(model))
        if average is not None:
            refuse_other(path, "average", average.state_dict(), files.get(_AVERAGE, {}))

    ranks.all_do(check)
    before = None
    if plain_state(model).keys() != files[_MODEL].keys():  # what is to be computed may have no direction
        before = {name: entry.clone() for name, entry in model.state_dict().items()}
    try:
        load_model(model, _model_state(content, files))
    except RuntimeError as error:
        if before is not None:
            model.load_state_dict(before)
        raise CheckpointError(f"the checkpoint {path} does not fit this model: {error}") from None
    if average is not None:
        average.load_state_dict(files[_AVERAGE])
    return int(content["step"])


def _collect(state: TrainState, files: dict[str, dict[str, Tensor]], keeps: bool) -> dict[str, Any]:
    """What state.json says; the tensors are put into `files` by file name, whole, if this process keeps them."""

    def into(name: str) -> Callable[[str, Tensor], None]:
        def put(path: str, tensor: Tensor) -> None:
            if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype == torch.complex128:
                raise CheckpointError(
                    f"{path} cannot be saved: expected a dense tensor of up to 64 bits a number, got {tensor.layout}, "
                    f"{tensor.dtype} on {tensor.device}"
                )
            full = whole(tensor.detach())  # of a sharded one every process must ask
            if keeps:
                files.setdefault(name, {})[path] = full.cpu()

        return put

    extra = {}
    for name, entry in plain_state(state.model).items():
        if isinstance(entry, Tensor):
            into(_MODEL)(name, entry)
        else:  # what a module's own get_extra_state returned
            extra[name] = pack(entry, name, into(_OTHER))
    if state.average is not None:
        for name, tensor in state.average.state_dict().items():
            into(_AVERAGE)(name, tensor)
    names, others = parameter_names(state.model), into(_OTHER)
    return {
        "extra": extra,
        "optimizers": [
            pack(optimizer_state(optimizer, names), str(i), into(_OPTIMIZER))
            for i, optimizer in enumerate(state.optimizers)
        ],
        "scaler": None if state.scaler is None else pack(state.scaler.state_dict(), "scaler", others),
        "watch": None if state.watch is None else pack(state.watch.state_dict(), "watch", others),
        "facts": pack(state.facts, "facts", others),
    }


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _restore_random(
    content: Mapping[str, Any], saved: Mapping[str, Tensor], ranks: Ranks, device: torch.device
) -> None:
    then, now, mine = content["processes"], ranks.size, f"{ranks.rank}."
    if ranks.rank < then:
        states = {name.removeprefix(mine): tensor for name, tensor in saved.items() if name.startswith(mine)}
        restore_random_states(states, device)
    else:
        seed_new_process(content["step"], ranks.rank)
    if ranks.first and then != now:
        logger.warning(
            "the checkpoint is of %s processes and this run has %s: it goes on from the same state, but not bit for "
            "bit. Processes that are new draw random numbers of their own",
            then,
            now,
        )


def _model_state(content: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    return {**files[_MODEL], **unpack(content["extra"], files.get(_OTHER, {}))}
