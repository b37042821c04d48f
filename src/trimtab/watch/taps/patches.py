"""Functions replaced while a logged forward runs, and put back after it.

Replaced are the names that programs know an attention function by, wherever they stand: in the module that defines
it, in those that imported it from there, and in attributes of the model's modules. No other call is slowed down, no
fast path is left, and nothing stays behind. The replacement calls the original and tells every open forward of its
thread.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from trimtab.watch.taps import flash, flex, huggingface, multihead, sdpa, softcapped
from trimtab.watch.taps.backend import BackEnd, Call
from trimtab.watch.taps.forward import Forward

_RULES = "torch._dynamo.trace_rules"


class Place(NamedTuple):
    """A name that stands for a function whose calls are to be seen."""

    owner: Any
    name: str
    function: Any
    back_end: BackEnd


class _Replaced(NamedTuple):
    owner: Any
    name: str
    original: Any
    replacement: Any


_lock = threading.RLock()
_open: list[Forward] = []
_replaced: list[_Replaced] = []
_imported: set[str] = set()  # before names were replaced


def places(model: nn.Module) -> list[Place]:
    """Every place where a function of some back-end stands now; a scan of what is imported, tens of milliseconds."""
    with _lock:
        originals = {id(each.replacement): each.original for each in _replaced}  # another model may be open
        back_ends: dict[int, BackEnd] = {}
        for functions, back_end in (
            (sdpa.functions(), sdpa.BACK_END),
            (softcapped.functions(), softcapped.BACK_END),
            (flex.functions(), flex.BACK_END),
            (flash.functions(), flash.BACK_END),
            (huggingface.functions(model), huggingface.BACK_END),
        ):
            back_ends |= {id(originals.get(id(function), function)): back_end for function in functions}
        found = []
        for cls, back_end in multihead.methods():
            forward = vars(cls)["forward"]
            found.append(Place(cls, "forward", originals.get(id(forward), forward), back_end))
        for owner in (*sys.modules.values(), *model.modules()):
            names = getattr(owner, "__dict__", None)
            for name, value in list(names.items()) if type(names) is dict else []:
                function = originals.get(id(value), value)
                known = back_ends.get(id(function)) or _compiled_copy_of(function, back_ends)
                if known is not None:
                    found.append(Place(owner, name, function, known))
        return found


def _compiled_copy_of(function: Any, back_ends: dict[int, BackEnd]) -> BackEnd | None:
    """For `torch.compile(flex_attention)`, the back-end of what was compiled."""
    if type(function) is not FunctionType:
        return None
    return back_ends.get(id(getattr(function, "_torchdynamo_orig_callable", None)))


def open_(forward: Forward, at: Iterable[Place]) -> None:
    """Let the calls of this forward be seen, until `close`."""
    with _lock:
        _open.append(forward)
        if not _replaced:
            _imported.update(sys.modules)
            _read_rules()
            _replace(nn.Module, "__call__", nn.Module.__call__, _followed(nn.Module.__call__))
        for owner, name, function, back_end in at:
            if vars(owner).get(name) is function:  # else it is replaced already, or the program has another there now
                _replace(owner, name, function, _watched(function, back_end))


def close(forward: Forward) -> None:
    """See no more of this forward; the last one to close puts everything back."""
    with _lock:
        if forward in _open:
            _open.remove(forward)
        if not _open and _replaced:
            _put_right_what_was_imported_since()
        while not _open and _replaced:
            each = _replaced.pop()
            if vars(each.owner).get(each.name) is each.replacement:
                setattr(each.owner, each.name, each.original)


def _put_right_what_was_imported_since() -> None:
    """A module imported during a forward may have taken a replacement for the function."""
    new = sys.modules.keys() - _imported
    originals = {id(each.replacement): each.original for each in _replaced}
    for module in [sys.modules[name] for name in new]:
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in originals:
                setattr(module, name, originals[id(value)])
    _imported.clear()
    if _RULES in new and hasattr(_rules(), "cache_clear"):
        _rules().cache_clear()


def _replace(owner: Any, name: str, original: Any, replacement: Any) -> None:
    _replaced.append(_Replaced(owner, name, original, replacement))
    setattr(owner, name, replacement)


def _watched(function: Callable[..., Any], back_end: BackEnd) -> Callable[..., Any]:
    """The function, and after each call of it the statistics, unless some call inside it was seen already."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        listening = [(forward, forward.calls) for forward in _listening()]
        result = function(*args, **kwargs)
        for forward, calls in listening:
            if forward.calls == calls:
                forward.record(back_end, Call(function, args, kwargs, result))
        return result

    return call


def _followed(original: Callable[..., Any]) -> Callable[..., Any]:
    """`nn.Module.__call__`, by which the open forwards know which module is running."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entered = [(forward, forward.enter(self)) for forward in _listening() if forward.knows(self)]
        try:
            result = original(self, *args, **kwargs)
            for forward, mark in entered:
                forward.returned(mark, result)
            return result
        finally:
            for forward, mark in entered:
                forward.leave(mark)

    return call


def _listening() -> list[Forward]:
    if not _open or torch.compiler.is_compiling():
        return []
    thread = threading.get_ident()
    return [forward for forward in _open if forward.thread == thread and not forward.busy]


def _read_rules() -> None:
    """Let torch.compile, where it is loaded, read its table of torch functions before their names are replaced."""
    if _rules() is not None:
        _rules()()


def _rules() -> Any:
    """The cached function that reads the table by names; None where it is not loaded, or another torch has none."""
    return getattr(sys.modules.get(_RULES), "get_torch_obj_rule_map", None)
