"""The ways into a model: where the program calls it, and a tap can learn that a forward begins."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from trimtab.watch.taps import compiled

Inputs = tuple[Any, ...]
Options = dict[str, Any]


def recomputes_or_captures() -> bool:
    """Whether what runs now is nothing to look at.

    Inside a backward it is a recomputation for activation checkpointing, seen already. While a CUDA graph is
    captured nothing may be read, or the capture fails; what is traced would take our operations for the model's.
    """
    captures = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return captures or torch._C._is_tracing() or torch._C._current_graph_task_id() != -1


class Entries:
    """Calls one pair of functions around every forward of a model, another around every call of a compiled copy.

    Args:
        model: the model.
        enter: called with the arguments of a forward that runs as plain Python.
        leave: called after it, with whether it ended well. After Ctrl-C torch does not call it.
        enter_compiled: called before compiled code runs, with an eager function that does the same, and the arguments.
        leave_compiled: called after it, also when it raised.
    """

    def __init__(
        self,
        model: nn.Module,
        enter: Callable[[Inputs, Options], None],
        leave: Callable[[bool], None],
        enter_compiled: Callable[[Callable[..., object], Inputs, Options], None],
        leave_compiled: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._enter_compiled, self._leave_compiled = model, enter_compiled, leave_compiled
        self._wrapped: list[nn.Module] = []  # by torch.compile, apart from the model
        self._in_place: _Compiled | None = None
        self._error: BaseException | None = None  # that was being handled when the forward began

        def before(_: nn.Module, args: Inputs, kwargs: Options) -> None:
            self._error = sys.exc_info()[1]
            enter(args, kwargs)

        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(Hook(before), with_kwargs=True),
            model.register_forward_hook(Hook(lambda *_: leave(sys.exc_info()[1] is self._error)), always_call=True),
        ]
        self.renew()

    def renew(self) -> None:
        """Find the ways into compiled copies of the model that have come up since."""
        inner = self._model._compiled_call_impl
        if inner is not None and self._in_place not in _links(inner):
            self._in_place = _Compiled(inner, self._model, self._enter_compiled, self._leave_compiled)
            self._model._compiled_call_impl = self._in_place
        for wrapper in compiled.wrappers(self._model):
            if not any(wrapper is known for known in self._wrapped):
                self._wrapped.append(wrapper)
                enter = Hook(lambda called, args, kwargs: self._enter_compiled(called.forward, args, kwargs))
                self._hooks += [
                    wrapper.register_forward_pre_hook(enter, with_kwargs=True),
                    wrapper.register_forward_hook(Hook(lambda *_: self._leave_compiled()), always_call=True),
                ]

    def remove(self) -> None:
        """Remove every hook."""
        for hook in self._hooks:
            hook.remove()
        if self._in_place is not None:
            for outer in _links(self._model._compiled_call_impl):
                if outer.inner is self._in_place:
                    outer.inner = self._in_place.inner
            if self._model._compiled_call_impl is self._in_place:
                self._model._compiled_call_impl = self._in_place.inner
            self._in_place = None


class Hook:
    """A hook that compiled code does not see, and that stays behind when the model is copied or pickled."""

    only_looks = True  # for models that take another way through layers whose hooks may change something

    def __init__(self, call: Callable[..., None] | None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        """Pass the call on."""
        # Asked first: compiled code then depends on nothing of this hook.
        if not torch.compiler.is_compiling() and self.call is not None:
            self.call(*args)

    def __reduce__(self) -> tuple[type["Hook"], tuple[None]]:
        return Hook, (None,)


class _Compiled:
    """Stands where `model.compile()` has put its compiled call; torch leaves both behind when it copies or pickles."""

    def __init__(
        self, inner: Callable[..., Any], model: nn.Module, enter: Callable[..., None], leave: Callable[[], None]
    ) -> None:
        self.inner, self._model, self._enter, self._leave = inner, model, enter, leave

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the compiled code."""
        if torch.compiler.is_compiling():
            return self.inner(*args, **kwargs)
        self._enter(self._model._call_impl, args, kwargs)
        try:
            return self.inner(*args, **kwargs)
        finally:
            self._leave()


def _links(call: Any) -> list[_Compiled]:
    """Those that stand before a compiled call, outermost first: one for each that looks at the model."""
    links = []
    while isinstance(call, _Compiled):
        links.append(call)
        call = call.inner
    return links
