"""What a tap on one attention back-end is made of."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.watch.signals import HeadStats


class Call(NamedTuple):
    """One call of an attention function that went well."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def arguments(self) -> dict[str, Any]:
        """All arguments by name, defaults included; those of a ``**kwargs`` parameter among the others."""
        signature = inspect.signature(self.function)
        bound = signature.bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name)
        return arguments


def _caller(call: Call) -> None:
    return None


@dataclass(frozen=True)
class BackEnd:
    """A way to compute attention, and how to measure a call of it.

    Attributes:
        name: as the coverage table shows it.
        measure: the statistics of a call; raises, with a reason to show, where it cannot tell.
        owner: the module whose attention the call is; None means the module that is running.
        note: what the coverage table says beside "exact".
    """

    name: str
    measure: Callable[[Call], HeadStats]
    owner: Callable[[Call], nn.Module | None] = _caller
    note: str = ""


class NotMeasuredError(ValueError):
    """The call is of a kind whose statistics would be a guess."""


def as_attention_sees(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which autocast, if it is on, lets attention see it."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return tensor.detach().to(torch.get_autocast_dtype(kind))
    return tensor.detach()
