"""A model given back as it was when changing it fails halfway."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimtab.reparam import registry
from trimtab.reparam.layers import Reparametrized


@contextmanager
def undone_on_error(model: nn.Module, values: bool) -> Iterator[None]:
    """Give every module back its class, parameters, children and hooks if an error comes.

    Args:
        model: the model.
        values: whether the values of parameters and buffers are kept, too, which takes their memory a second time.
            One stabilizer checks before it writes; a second may object only after the first has written.
    """
    modules = list(model.modules())
    kept = [(module, type(module), _copied(module.__dict__)) for module in modules]
    tensors = [*model.parameters(), *model.buffers()] if values else []
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for module, cls, attributes in kept:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            if isinstance(module, Reparametrized):
                registry.add(module)  # folding had it forgotten
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)
        raise


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copy a module's attributes, and the dicts among them (parameters, buffers, children, hooks), not their values."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in attributes.items()}
