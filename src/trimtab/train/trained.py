"""What a run has trained, for whoever uses it: its recipe, its files and its weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import nn

from trimtab.errors import CheckpointError, RunFolderError
from trimtab.stabilizers import fold_, stabilize_, with_changes
from trimtab.stabilizers.apply import applied
from trimtab.stabilizers.fold import folds
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.recipes import recipe_of
from trimtab.train.average import Average
from trimtab.train.checkpoints import best_checkpoint, load_weights, newest_checkpoint
from trimtab.train.checkpoints.files import CHECKPOINTS, in_order
from trimtab.train.folder import FILES, RUN
from trimtab.train.progress import read_result

RecipeT = TypeVar("RecipeT", bound=Recipe)
ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Trained(Generic[RecipeT]):
    """A run that has a checkpoint.

    Attributes:
        recipe: with the changes to it that its stabilizers ask for, as it was trained.
        files: what its task left for whoever uses the model, name to text.
        checkpoint: that of the best weights if the run stops early, its newest otherwise.
    """

    recipe: RecipeT
    files: dict[str, str]
    checkpoint: Path


def open_trained(folder: str | Path, kind: type[RecipeT]) -> Trained[RecipeT]:
    """Find out what a run has trained.

    Args:
        folder: the run's.
        kind: the recipe that is wanted.

    Raises:
        RunFolderError: the folder is no run, or a run of another kind of recipe.
        CheckpointError: it has no whole checkpoint.
        RecipeError: the recipe cannot be found or is damaged.
    """
    folder = Path(folder)
    try:
        info = dict(json.loads((folder / RUN).read_bytes()))
        files = {path.name: path.read_text("utf-8") for path in (folder / FILES).glob("*") if path.suffix != ".part"}
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(
            f"{folder} is no run folder that can be read, it has no {RUN}: name the folder that a run was trained "
            "into, such as runs/NAME"
        ) from None
    except OSError as error:
        reason = f"{error.filename}: {error.strerror or error}"
        raise RunFolderError(f"{folder} is no run folder that can be read ({reason})") from None
    except (ValueError, TypeError) as error:
        raise RunFolderError(
            f"{folder} is no run folder that can be read, its {RUN} or a file in {FILES}/ is damaged ({error}): copy "
            "the whole folder again, or train anew"
        ) from None
    recipe = recipe_of(info)
    if not isinstance(recipe, kind):
        raise RunFolderError(f"{folder} holds a run of {type(recipe).__name__}; expected one of {kind.__name__}")
    recipe = with_changes(recipe, recipe.stabilizer)
    best = best_checkpoint(folder) if recipe.patience is not None else None
    checkpoint = best or newest_checkpoint(folder)
    if checkpoint is None:
        result = read_result(folder)
        if result is not None and result.status == "diverged":
            raise CheckpointError(f"{folder} is of a run that diverged before its first checkpoint: train anew")
        if in_order(folder / CHECKPOINTS):
            raise CheckpointError(f"none of the checkpoints of {folder} is whole: copy them again, or train anew")
        raise CheckpointError(f"{folder} has no whole checkpoint yet: train on, or wait for its first")
    return Trained(recipe, files, checkpoint)


def load_trained(trained: Trained[RecipeT], make: Callable[[], ModelT]) -> ModelT:
    """The trained model, in eval mode; its stabilizers are folded into the weights, as far as they fold.

    Args:
        trained: as `open_trained` found it.
        make: makes the model in plain layers, as the recipe's task does.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model, or its weights are not finite.
    """
    recipe, model = trained.recipe, make()
    stabilize_(model, recipe.stabilizer, changes_made=True)
    average = None if recipe.ema is None else Average(model, recipe.ema)
    load_weights(trained.checkpoint, model, average)
    if average is not None:
        average.put_(model)
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise CheckpointError(f"{trained.checkpoint} is of a run that diverged: {name} is not finite. Train anew")
    model.eval()
    return fold_(model) if any(map(folds, applied(model))) else model
