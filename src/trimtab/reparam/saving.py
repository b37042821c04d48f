"""Writing a converted model for the rest of the world, which knows nothing of gamma."""

import copy
import os
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.errors import ConversionError
from trimtab.reparam.convert import fold_
from trimtab.reparam.sigmas import sigma_gamma


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """Write a folded copy of a converted model; the model itself stays converted and goes on training.

    A Hugging Face model is written by its own ``save_pretrained`` and loads in plain transformers; any other model
    becomes ``model.safetensors``, to be loaded into the plain, unconverted model (``safetensors.torch.load_model``).

    Args:
        model: a converted model.
        folder: where to write; made if missing.
        options: passed on to the model's own ``save_pretrained``, if it has one.

    Raises:
        ConversionError: if nothing in the model is converted, or it cannot be folded.
        ImportError: if the model is not a Hugging Face one and safetensors is not installed.
    """
    if not sigma_gamma(model):
        raise ConversionError("no layer of this model is converted: save it by its own means")
    try:
        plain = copy.deepcopy(model)
    except Exception as error:
        raise ConversionError(
            f"cannot copy the model in order to fold the copy ({error}); gather a sharded model first"
        ) from error
    fold_(plain)
    own = getattr(plain, "save_pretrained", None)
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
