"""The class of a module, swapped: each plain layer class has one converted subclass, made when first needed.

Converting swaps the class of the very same module object, so references, hooks, sharing and the Parameter itself stay
what they were.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from trimtab.reparam import registry
from trimtab.reparam.carried import Start, carried_names
from trimtab.reparam.config import SigmaReparam
from trimtab.reparam.embedding import Embedding
from trimtab.reparam.layers import Conv, Linear, Reparametrized, TransposedLinear
from trimtab.reparam.multihead import MultiheadAttention


def carry_(module: nn.Module, starts: dict[str, Start], config: SigmaReparam) -> None:
    """Turn a plain module into its converted class, carrying what is given for each weight named.

    Every gamma is a Parameter; modules that share a weight are given the same Start.
    """
    for weight_name, start in starts.items():
        gamma_name, u_name, v_name = carried_names(weight_name)
        setattr(module, gamma_name, start.gamma)
        module.register_buffer(u_name, start.basis)
        module.register_buffer(v_name, start.v)
    # A function that chose the blocks has done so, and may be one that cannot be pickled.
    module.__dict__["_sigma_config"] = replace(config, blocks="auto") if callable(config.blocks) else config
    before = module.__dict__.get("_carried_sizes", {})
    module.__dict__["_carried_sizes"] = before | {name: start.sizes for name, start in starts.items()}
    module.__class__ = converted_class(plain_class_of(module))
    registry.add(module)


def drop_(module: Reparametrized) -> None:
    """Turn a converted module back into its plain class, dropping gamma and vectors; the weight stays as it is.

    An attention module whose heads have norms or a soft cap keeps the converted forward.
    """
    registry.discard(module)
    for weight_name in module._carried_sizes:
        for name in carried_names(weight_name):
            delattr(module, name)
    if isinstance(module, MultiheadAttention) and module.needs_own_forward:
        module._carried_sizes = {}
        return
    del module._carried_sizes, module._sigma_config
    module.__class__ = module.plain_class  # type: ignore[assignment]


_converted_classes: dict[type[nn.Module], type[nn.Module]] = {}


def converted_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the converted subclass of a plain layer class (made once for each).

    Raises:
        TypeError: if the class is none that `mixin_of` knows.
    """
    if plain not in _converted_classes:
        mixin = mixin_of(plain)
        if mixin is None:
            raise TypeError(f"{plain.__name__} is no layer sigma-Reparam knows")
        contents = {"plain_class": plain, "__module__": __name__, "__reduce_ex__": _reduce}
        _converted_classes[plain] = type(f"SigmaReparam{plain.__name__}", (mixin, plain), contents)
    return _converted_classes[plain]


def plain_class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class a module has, or had before it was converted."""
    return module.plain_class if isinstance(module, Reparametrized) else type(module)


def mixin_of(plain: type[nn.Module]) -> type[Reparametrized] | None:
    """Return the mixin that converts a class, or None for a class whose forward is not one we know.

    A subclass counts as its base only while it keeps the base's forward: a forward of its own may do anything with
    the weight.
    """
    known: list[tuple[type[nn.Module], type[Reparametrized]]] = [
        (nn.Linear, Linear),
        (nn.Conv1d, Conv),
        (nn.Conv2d, Conv),
        (nn.Conv3d, Conv),
        (nn.MultiheadAttention, MultiheadAttention),
        (nn.Embedding, Embedding),
    ]
    for base, mixin in known:
        forwards = [name for name in ("forward", "_conv_forward") if hasattr(base, name)]
        if issubclass(plain, base) and all(getattr(plain, name) is getattr(base, name) for name in forwards):
            return mixin
    for base in plain.__mro__:
        if (base.__module__, base.__name__) == ("transformers.pytorch_utils", "Conv1D"):
            return TransposedLinear if plain.forward is vars(base).get("forward") else None
    return None


def _reduce(module: Reparametrized, protocol: Any) -> Any:
    """Pickle by the plain class, since the converted one is made at run time; deepcopy goes the same way."""
    return _rebuild, (module.plain_class,), module.__getstate__()


def _rebuild(plain_class: type[nn.Module]) -> nn.Module:
    cls = converted_class(plain_class)
    module = cls.__new__(cls)
    registry.add(module)
    return module
