"""Whether the runs of a compare could begin, found out before the first of them starts."""

from collections.abc import Sequence

import torch

from trimtab.errors import TrimtabError
from trimtab.stabilizers import with_changes
from trimtab.tasks.recipe import Recipe
from trimtab.train.compare.grid import RunPlace
from trimtab.train.hardware import Hardware, checked
from trimtab.train.loop import check_fit
from trimtab.train.randomness import numerics


def refuse_if_none_can_begin(places: Sequence[RunPlace], hardware: Hardware) -> None:
    """Load the data and draw the model of a run, as each run will do; of another arm's if that cannot be done.

    Raises:
        TrimtabError: what every arm says alike, most often that the data cannot be loaded. Where arms differ in this,
            or an error is none of Trimtab's, the runs tell.
    """
    said: TrimtabError | None = None
    for recipe in {place.arm: place.recipe for place in places}.values():
        try:
            _begin(recipe, hardware)
        except TrimtabError as error:
            if said is not None and (type(error), str(error)) != (type(said), str(said)):
                return
            said = said or error
        except Exception:
            return
        else:
            return
    if said is not None:
        raise said


def _begin(recipe: Recipe, hardware: Hardware) -> None:
    used = with_changes(recipe, recipe.stabilizer)
    checked(hardware, used.precision)
    with numerics(used.seed, torch.device("cpu")):
        check_fit(used, used.task())
