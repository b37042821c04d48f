"""`softcap`: logits s are used as c tanh(s / c)."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trimtab.attention.softcap import soft_cap, softcapped_attention
from trimtab.errors import ConversionError, RecipeError
from trimtab.reparam import fastpath
from trimtab.reparam.heads import Projections
from trimtab.stabilizers.clipper import refuse_clipped
from trimtab.stabilizers.places import (
    attention_modules,
    check_own_forward,
    output_head,
    own_forward_,
    refuse_hook,
    refuse_soft_cap,
)
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer

# In a tuple, out of sight of whoever replaces the function by its names, as `trimtab.watch` does for a while.
_SDPA = (F.scaled_dot_product_attention,)
_SDPA_NAME = "scaled_dot_product_attention"
_CHANGE_THAT = "change that one, or leave softcap away"


@register("softcap")
@dataclass(frozen=True)
class SoftCap(Stabilizer):
    """Soft cap: attention logits and final logits s become c tanh(s / c), which is never larger than c.

    Gemma Team, "Gemma 2", 2024, arXiv 2408.00118, section 2, which caps attention at 50 and the final logits at 30.
    Capped is all attention that is computed by ``scaled_dot_product_attention`` or nn.MultiheadAttention, before masks
    are added. It changes the model's function wherever logits come near to the cap.

    When not to use it: where the memory or speed of fused attention is needed, since no fused kernel has a cap: the
    logits are stored, (batch, heads, queries, keys) in float32. Far beyond the cap the gradient of a logit vanishes.
    And not with qk-clip, which goes by the size of the attention logits.

    Attributes:
        attention: c of the attention logits; None leaves them as they are.
        logits: c of the final logits; None leaves them as they are.
        head: dotted name of the layer that makes the final logits; None finds it.
    """

    order = 45

    attention: float | None = 50.0
    logits: float | None = 30.0
    head: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("attention", "logits"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"softcap: {name} must be positive, or none for no cap; got {value}")
        if self.attention is None and self.logits is None:
            raise RecipeError("softcap: attention and logits are both none, so there is nothing to cap")

    def apply_(self, model: nn.Module) -> None:
        """Cap the logits of every attention module, and those of the output, in place.

        Raises:
            ConversionError: attention, or the layer that makes the final logits, is not found, is capped already, or
                is computed in a way that cannot be capped.
        """
        if self.attention is not None:
            refuse_clipped(model, "which goes by the size of the logits, that a soft cap hides: take attention=none")
        found = [] if self.attention is None else attention_modules(model, "softcap")
        for attention in found:
            _refuse_strange(attention, model)
        head = None
        if self.logits is not None:
            head = output_head(model, self.head, "softcap")
            refuse_hook(head, _CapLogits, "a soft cap")
            refuse_soft_cap(model, "the model", _CHANGE_THAT, ("final_logit_softcapping",))
        for attention in found:
            if isinstance(attention.holder, nn.MultiheadAttention):
                own_forward_(attention.holder)
                attention.holder.__dict__["softcap"] = self.attention
            else:
                attention.holder.__dict__["attention_softcap"] = self.attention
                attention.holder.__class__ = _capped_class(type(attention.holder))
        if head is not None and self.logits is not None:
            head.register_forward_hook(_CapLogits(self.logits), prepend=True)  # z-loss, say, is of the capped logits
        fastpath.switch_off_(model)


@dataclass(frozen=True)
class _CapLogits:
    """A forward hook."""

    softcap: float

    def __call__(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        return soft_cap(output, self.softcap)


class _Capping(TorchFunctionMode):
    """While it is entered, `scaled_dot_product_attention` has a soft cap."""

    def __init__(self, softcap: float) -> None:
        super().__init__()
        self.softcap, self.calls = softcap, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__wrapped__", func) in _SDPA:  # a replacement has it under that name
            self.calls += 1
            query, key, value, *rest = args
            return softcapped_attention(query, key, value, self.softcap, *rest, **kwargs)[0]
        if func is Tensor.unflatten:  # written in Python, in a way that torch.compile does not follow inside a mode
            func = torch.unflatten
        return func(*args, **kwargs)


class _Capped(nn.Module):
    """Mixin of attention modules whose logits are capped."""

    plain_class: ClassVar[type[nn.Module]]
    attention_softcap: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend as the plain class does, with capped logits."""
        with _Capping(self.attention_softcap) as capping:
            result = super().forward(*args, **kwargs)
        if not torch.compiler.is_compiling() and not capping.calls:
            raise ConversionError(
                f"{self.plain_class.__name__} computed attention without {_SDPA_NAME}, so that no soft cap was "
                "applied: switch its attention to that function, or leave softcap away (or take attention=none)"
            )
        return result


_capped_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _capped_class(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _capped_classes:
        contents = {"plain_class": plain, "__module__": __name__, "__reduce_ex__": _reduce}
        _capped_classes[plain] = type(f"SoftCapped{plain.__name__}", (_Capped, plain), contents)
    return _capped_classes[plain]


def _reduce(module: _Capped, protocol: Any) -> Any:
    """Pickle by the plain class, since the capped one is made at run time; deepcopy goes the same way."""
    return _rebuild, (module.plain_class,), module.__getstate__()


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    cls = _capped_class(plain)
    return cls.__new__(cls)


def _refuse_strange(attention: Projections, model: nn.Module) -> None:
    """Raise a ConversionError if a module's attention is capped, or cannot be."""
    holder, name = attention.holder, attention.name or "the model"
    for owner in (holder, model):
        refuse_soft_cap(owner, name, _CHANGE_THAT)
    if isinstance(holder, nn.MultiheadAttention):
        check_own_forward(holder, attention.name)
        return
    config = getattr(holder, "config", None) or getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in (None, "sdpa"):
        raise ConversionError(
            f"{name} computes attention by attn_implementation={implementation!r}, whose logits cannot be reached: "
            'load the model with attn_implementation="sdpa"'
        )
    if implementation is None and not _may_call_sdpa(type(holder)):
        raise ConversionError(
            f"{name} ({type(holder).__name__}) computes attention without {_SDPA_NAME}, so that its logits cannot be "
            "capped: use that function, or take attention=none"
        )


def _may_call_sdpa(cls: type) -> bool:
    """Whether any function of a class, or of the files that define it, names torch's attention function."""
    files = {each.__module__ for each in cls.__mro__ if each.__module__.split(".")[0] not in ("torch", "builtins")}
    spaces = [vars(each) for each in (*cls.__mro__, *map(sys.modules.get, files)) if each is not None]
    functions = [value for space in spaces for value in list(space.values()) if isinstance(value, FunctionType)]
    return any(each.__module__ in files and _SDPA_NAME in each.__code__.co_names for each in functions)
