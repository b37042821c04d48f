"""Writing a stabilized model for the rest of the world, which knows nothing of it."""

import copy
import os
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.errors import ConversionError
from trimtab.stabilizers.apply import applied_within
from trimtab.stabilizers.fold import fold_

# These stay part of the function; of deepnorm it is the eps of the norms, which no file of weights holds.
_NOT_PLAIN = ("qk-norm", "softcap", "deepnorm")


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """Write a folded copy of a stabilized model; the model itself stays as it is and goes on training.

    A Hugging Face model is written by its own ``save_pretrained`` and loads in plain transformers; any other model
    becomes ``model.safetensors``, to be loaded into the plain model (``safetensors.torch.load_model``).

    Args:
        model: a stabilized model.
        folder: where to write; made if missing.
        options: passed on to the model's own ``save_pretrained``, if it has one.

    Raises:
        ConversionError: there is nothing to fold, it cannot be folded, or something would be left that a plain model
            does not compute.
        ImportError: if the model is not a Hugging Face one and safetensors is not installed.
    """
    try:
        plain = copy.deepcopy(model)
    except Exception as error:
        raise ConversionError(
            f"cannot copy the model in order to fold the copy ({error}); gather a sharded model first"
        ) from error
    fold_(plain)
    left = [each.name for each in applied_within(model) if each.name in _NOT_PLAIN]
    if left:
        raise ConversionError(f"a plain model would not compute {left[0]}, which cannot be folded: save the state dict")
    own = getattr(plain, "save_pretrained", None)
    if callable(own) and any(getattr(each, "remove_norms", False) for each in applied_within(model)):
        raise ConversionError(
            f"a plain {type(plain).__name__} has the norm layers that were taken out of this one: save the state dict, "
            "and load it into a model without them (tt.remove_norms_)"
        )
    if callable(own):
        own(folder, **options)
        return
    try:
        from safetensors.torch import save_model
    except ImportError as error:
        raise ImportError("safetensors is needed to write a model: pip install 'trimtab[lab]'") from error
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    aside = target / "model.safetensors.part"
    save_model(plain, str(aside))
    os.replace(aside, target / "model.safetensors")
