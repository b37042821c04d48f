"""Tied weights carry one gamma and one set of vectors; Hugging Face models, which tie by name, are told so.

Without it such a model refuses to save tensors that two modules share under names it does not know, and tying its
weights again, as it does after loading, would tie the weights alone.
"""

from torch import nn

from trimtab.reparam.carried import carried_names
from trimtab.reparam.layers import Reparametrized

_KEYS = "_tied_weights_keys"
_MEMORY = "_tied_keys_before"


def name_ties_(model: nn.Module) -> None:
    """Add what tied weights carry to the ties a Hugging Face model knows: a dict, name to the name it follows."""
    for holder in model.modules():
        known = getattr(holder, _KEYS, None)
        if isinstance(known, dict) and (ties := _shared_names(holder)):
            holder.__dict__.setdefault(_MEMORY, holder.__dict__.get(_KEYS))
            holder.__dict__[_KEYS] = known | ties


def forget_ties_(model: nn.Module) -> None:
    """Take back what `name_ties_` added."""
    for holder in model.modules():
        if _MEMORY in holder.__dict__:
            del holder.__dict__[_KEYS]
            before = holder.__dict__.pop(_MEMORY)
            if before is not None:
                holder.__dict__[_KEYS] = before


def _shared_names(holder: nn.Module) -> dict[str, str]:
    first: dict[int, list[str]] = {}
    ties: dict[str, str] = {}
    for name, module in holder.named_modules():
        for weight_name in module._carried_sizes if isinstance(module, Reparametrized) else ():
            own = [f"{name}.{part}".lstrip(".") for part in carried_names(weight_name)]
            gamma = module._parameters[carried_names(weight_name)[0]]
            kept = first.setdefault(id(gamma), own)
            ties |= {mine: theirs for mine, theirs in zip(own, kept, strict=True) if mine != theirs}
    return ties
