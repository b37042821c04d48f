"""`stabilize_`, and what stabilizers change in a recipe."""

import dataclasses
from typing import Any, TypeVar

from torch import nn

from trimtab.errors import ConversionError, RecipeError
from trimtab.stabilizers.options import nearest
from trimtab.stabilizers.registry import Spec, parse, spec_of
from trimtab.stabilizers.stabilizer import Stabilizer
from trimtab.stabilizers.undo import undone_on_error

ModelT = TypeVar("ModelT", bound=nn.Module)
RecipeT = TypeVar("RecipeT")

_APPLIED = "_stabilizers_applied"


def stabilize_(model: ModelT, spec: Spec, *, changes_made: bool = False) -> ModelT:
    """Apply stabilizers to a model, in place.

    ``tt.stabilize_(model, "sigma:gamma_init=one+qk-norm")``. Build the optimiser afterwards: parameters may be new.

    Args:
        model: any module.
        spec: names with their options, see `parse`; or `Stabilizer` objects.
        changes_made: whether the changes to the training itself that these stabilizers ask for (a warmup, a clipped
            gradient, an optimiser) have been made, as `with_changes` makes them in a recipe. Without that, they are
            refused, since nothing would come of them.

    Returns:
        The model.

    Raises:
        RecipeError: a name or an option is unknown.
        ConversionError: the model has nothing of what a stabilizer changes, or something it cannot change, or has that
            stabilizer already. The model is then as it was, whichever of several could not be applied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    stabilizers = parse(spec)
    before = applied(model)
    for each in stabilizers:
        if each.name in {other.name for other in before}:
            raise ConversionError(
                f"{each.name} is already applied to this model: fold_ it first, or build the model anew"
            )
        if not changes_made and not changes_models(each):
            raise ConversionError(
                f"{each.name} changes how a model is trained, not the model: name it in a recipe, "
                f'stabilizer="{spec_of((each,))}", or do the same in your own loop'
            )
    changing = [each for each in stabilizers if changes_models(each)]
    with undone_on_error(model, values=len(changing) > 1):
        for each in changing:
            each.apply_(model)
    if changing:
        model.__dict__[_APPLIED] = (*before, *changing)
    return model


def applied(model: nn.Module) -> tuple[Stabilizer, ...]:
    """Return what `stabilize_` has applied to a model and `fold_` not taken out again."""
    found: tuple[Stabilizer, ...] = model.__dict__.get(_APPLIED, ())
    return found


def applied_within(model: nn.Module) -> tuple[Stabilizer, ...]:
    """Return what `stabilize_` has applied to a model or any part of it, each once, and `fold_` not taken out again."""
    return tuple(dict.fromkeys(each for module in model.modules() for each in applied(module)))


def forget_applied_(model: nn.Module, stabilizers: list[Stabilizer]) -> None:
    """Let these be applied again, to the model and its parts: they have been folded."""
    for module in model.modules():
        left = tuple(each for each in applied(module) if each not in stabilizers)
        module.__dict__.pop(_APPLIED, None)
        if left:
            module.__dict__[_APPLIED] = left


def changes_models(stabilizer: Stabilizer) -> bool:
    """Say whether a stabilizer changes models, not only how they are trained."""
    return type(stabilizer).apply_ is not Stabilizer.apply_


def with_changes(recipe: RecipeT, spec: Spec) -> RecipeT:
    """Return a recipe with the changes to training that stabilizers ask for: a warmup, a clipped gradient, post-LN.

    Args:
        recipe: a frozen dataclass, which may hold others.
        spec: names with their options, see `parse`; or `Stabilizer` objects.

    Raises:
        RecipeError: the recipe lacks a field that a stabilizer changes, two ask for different values, or the recipe
            refuses the value.
    """
    asked: dict[str, tuple[Any, str]] = {}
    for each in parse(spec):
        for name, value in each.changes(recipe).items():
            other, by = asked.setdefault(name, (value, each.name))
            if other != value:
                raise RecipeError(f"{by} sets {name} to {other}, {each.name} to {value}: name only one of them")
            recipe = _replaced(recipe, name.split("."), value, f"{each.name} sets {name}")
    return recipe


def _replaced(config: Any, path: list[str], value: Any, what: str) -> Any:
    names = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    if path[0] not in names:
        like = nearest(path[0], names)
        hint = f"; did you mean {like}?" if like else ""
        raise RecipeError(f"{what}, but {type(config).__name__} has no field {path[0]!r}{hint}")
    if len(path) > 1:
        value = _replaced(getattr(config, path[0]), path[1:], value, what)
    return dataclasses.replace(config, **{path[0]: value})
