"""`fold_`: every stabilizer that folds, folded."""

from typing import TypeVar

from torch import nn

from trimtab.errors import ConversionError
from trimtab.stabilizers.apply import applied_within, forget_applied_
from trimtab.stabilizers.options import has_defaults
from trimtab.stabilizers.registry import STABILIZERS, place_of
from trimtab.stabilizers.stabilizer import Stabilizer
from trimtab.stabilizers.undo import undone_on_error

ModelT = TypeVar("ModelT", bound=nn.Module)


def fold_(model: ModelT) -> ModelT:
    """Fold everything in a model that folds, in place: sigma-Reparam, weight norm, scaled residual branches.

    The model computes what it did. Where all that was applied folds, its classes, parameters and state-dict keys are
    those of a model that was never stabilized. What does not fold, such as QK-norm, stays. An optimiser made for the
    stabilized model is of no use for the folded one.

    Args:
        model: a stabilized model.

    Returns:
        The model.

    Raises:
        ConversionError: there is nothing to fold, or a weight is not finite, sharded, on the meta device, or no
            parameter of its own any more.
        TypeError: if the model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    known = applied_within(model)
    others = [cls() for name, cls in STABILIZERS.items() if has_defaults(cls) and name not in {k.name for k in known}]
    folding = sorted(
        (each for each in (*known, *others) if folds(each)), key=lambda each: (each.folds_last, place_of(each))
    )
    before = _structure(model)
    with undone_on_error(model, values=sum(folds(each) for each in known) > 1):
        for each in folding:
            each.fold_(model)
    if _structure(model) == before and not any(each in known for each in folding):
        kept = ", ".join(each.name for each in known)
        raise ConversionError(
            f"nothing to fold: {kept} cannot be folded into weights"
            if kept
            else "nothing to fold: this model has no stabilizer (or was folded before)"
        )
    forget_applied_(model, folding)
    return model


def folds(stabilizer: Stabilizer) -> bool:
    """Say whether any of what a stabilizer does can be folded."""
    return type(stabilizer).fold_ is not Stabilizer.fold_


def _structure(model: nn.Module) -> list[object]:
    """What folding changes: the classes of modules and the names of what they hold."""
    return [
        (type(module), tuple(module._parameters), tuple(module._buffers), tuple(module._modules))
        for module in model.modules()
    ]
