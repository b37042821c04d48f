"""The weights of a ViT from a checkpoint: of a run, of a SimCLR run's encoder, or of a file of weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import CheckpointError, RecipeError
from trimtab.models.vit import ViT

_ENCODER = "encoder."  # where a SimCLR model has its ViT


def refuse_changes_of_start(stabilizer: str) -> None:
    """Raise a RecipeError if a stabilizer makes another function of the weights that training starts from."""
    from trimtab.stabilizers.registry import parse

    for each in parse(stabilizer):
        changes = {
            "gamma_init": getattr(each, "gamma_init", "spectral") != "spectral",
            "init_std": getattr(each, "init_std", None) is not None,
            "remove_norms": bool(getattr(each, "remove_norms", False)),
        }
        for option in (name for name, changed in changes.items() if changed):
            raise RecipeError(
                f"stabilizer {stabilizer} makes another function of the weights that training starts from: leave "
                f"{option} of {each.name} out (sigma by itself keeps the function)"
            )


@torch.no_grad()
def load_start_(model: ViT, path: str, new_head: bool = False) -> None:
    """Give a plain ViT the weights of a checkpoint; weights under sigma-Reparam come as they are used.

    Args:
        model: a ViT, in plain layers.
        path: a run folder (its newest checkpoint counts), a checkpoint's folder or a file. Of a SimCLR model the
            encoder is taken.
        new_head: leave the head as it is.

    Raises:
        CheckpointError: there is no readable checkpoint, or it is of another model: which field differs is told.
    """
    from trimtab.inspect.checkpoint import open_checkpoint
    from trimtab.inspect.converted import converted_weights

    checkpoint = open_checkpoint(path)
    prefix = _ENCODER if f"{_ENCODER}patches.weight" in checkpoint.entries else ""
    converted = converted_weights(checkpoint, ())
    beside = {name for each in converted.values() for name in each.names}
    names = [name for name in checkpoint.entries if name.startswith(prefix) and name not in beside]
    found = {name.removeprefix(prefix): checkpoint.entries[name].shape for name in names}
    own = model.state_dict()
    if new_head:
        for state in (found, own):
            for name in ("head.weight", "head.bias"):
                state.pop(name, None)
    _refuse_other(path, found, {name: tuple(tensor.shape) for name, tensor in own.items()})
    _refuse_other_heads(path, model)
    for name, tensor in own.items():
        stored = checkpoint.load(prefix + name)
        reparametrized = converted.get(prefix + name)
        if reparametrized is not None:
            gammas, sigmas = (torch.tensor(each) for each in reparametrized.read(stored, []))
            if len(gammas) != len(sigmas):
                raise CheckpointError(f"{path}: the sigmas of {prefix}{name} cannot be told: take a folded copy")
            scale = (gammas / sigmas).repeat_interleave(len(stored) // len(gammas))  # blocks are of equally many rows
            stored = stored * scale.view(-1, *[1] * (stored.ndim - 1))
        tensor.copy_(stored)


def _refuse_other(path: str, found: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> None:
    """Say which field of the model differs, or else which tensor."""
    if "patches.weight" not in found:
        raise CheckpointError(f"{path} holds no ViT of trimtab's, and no SimCLR model of one: it has no patches.weight")
    theirs, ours = _fields(found), _fields(own)
    for name, value in ours.items():
        if theirs[name] != value:
            what = f"--model.{name.replace('_', '-')} {theirs[name]} takes a model like that"
            if name == "num_classes":
                what = "--new-head draws a new head"
            elif name == "tokens":
                what = "image_size, patch_size and pool must be as they were"
            raise CheckpointError(f"{path} has {name} {theirs[name]}, the recipe's model has {value}: {what}")
    different = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"{path} is of another model: {name} has the shape {found.get(name)} there and {own.get(name)} in the "
            "recipe's model. Of a stabilized model (other than by sigma) take a folded copy, tt.save_pretrained"
        )


def _fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the shapes of a ViT's weights tell of its config."""
    dim, channels, side, _ = shapes["patches.weight"]
    nothing: tuple[int, ...] = (0, 0)
    return {
        "num_classes": shapes.get("head.weight", nothing)[0],
        "in_channels": channels,
        "patch_size": side,
        "dim": dim,
        "depth": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "pool": "cls" if "class_token" in shapes else "mean",
        "tokens": shapes.get("position", nothing)[0],
        "norm": "none" if "blocks.0.mlp_norm.weight" not in shapes else "pre" if "norm.weight" in shapes else "post",
    }


def _refuse_other_heads(path: str, model: ViT) -> None:
    """The number of heads shows in no weight: where the run's own run.json is near, it is asked."""
    place = Path(path).resolve()
    for folder in (place, *list(place.parents)[:3]):
        if (folder / "run.json").is_file():
            try:
                there = json.loads((folder / "run.json").read_text(encoding="utf-8"))["recipe"]["model"]["num_heads"]
            except (OSError, ValueError, KeyError, TypeError):
                return
            if there != model.config.num_heads:
                raise CheckpointError(
                    f"{path} has num_heads {there}, the recipe's model has {model.config.num_heads}: "
                    f"--model.num-heads {there} takes a model like that"
                )
            return
