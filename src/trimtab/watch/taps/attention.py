"""A tap on the attention of a model: every call, by the module that makes it, without touching it."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.attention import attention_stats
from trimtab.watch.coverage import Coverage, Seen
from trimtab.watch.signals import HeadStats, head_stats
from trimtab.watch.taps import compiled, patches
from trimtab.watch.taps.backend import as_attention_sees
from trimtab.watch.taps.entries import Entries, recomputes_or_captures
from trimtab.watch.taps.forward import Forward, dotted_names

_LOOKS_IN_VAIN = 3
_OPTIONS = tuple(inspect.signature(attention_stats).parameters)[2:]


class AttentionTap:
    """Sees the attention calls of a model's training forwards, from its making until `close`.

    docs/coverage.md has the back-ends that are seen. A call belongs to the innermost module that makes it; the
    second call of the same module in one forward is called "name#2". Counted are forwards in training mode with
    gradients on or, when a step has none, those with only one of the two. Activations recomputed in the backward are
    not counted, nor are forwards that raised an error. Where something is compiled, a forward of its own, eager and
    without a trace, shows the attention.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[], bool]) -> None:
        self._model, self._wanted = model, wanted
        self._training, self._evaluating = Seen(), Seen()  # forwards that are trained on, and others
        self._pending = Seen()  # of the forward that is going on
        self._trouble = ""
        self._forward: Forward | None = None
        self._places: list[patches.Place] | None = None
        self._compiled = False  # a compiled copy of the model is being called, and was looked at before
        self._in_vain = 0  # times in a row that nothing was seen
        self._imported = 0  # modules in the process when compiled copies and functions were last looked for
        self._entries = Entries(model, self._enter, self._left, self._enter_compiled, self._left_compiled)

    def take(self) -> dict[str, HeadStats]:
        """What was seen since the last time, by module name, in the order of the first forward."""
        self._leave()  # a forward that Ctrl-C interrupted has not left
        calls = self._training.merged() or self._evaluating.merged()
        self._training.stats, self._evaluating.stats = {}, {}
        self._in_vain = 0 if calls else self._in_vain + 1
        # Compiled or imported since, perhaps. To look is slow: not for ever at a model that shows nothing.
        if self._imported != len(sys.modules) or 0 < self._in_vain <= _LOOKS_IN_VAIN:
            self._imported = len(sys.modules)
            self._entries.renew()
            self._places = None
        return calls

    def record(self, query: Tensor, key: Tensor, *, name: str | None = None, **options: Any) -> None:
        """Count attention that a program computes by hand: nothing unless this forward is being looked at.

        Args:
            query: (B..., H, L, D).
            key: (B..., H, S, D).
            name: what to call it; by default the name of the module that is running.
            options: those of `trimtab.attention_stats`.

        Raises:
            TypeError: something is not a tensor as expected.
            ValueError: shapes or options that do not fit together.
        """
        forward = self._forward
        if torch.compiler.is_compiling() or forward is None:
            return
        for what, value in (("query", query), ("key", key)):
            if not isinstance(value, Tensor):
                raise TypeError(f"expected {what} to be a tensor, got {type(value).__name__}")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"expected name to be a string or None, got {name!r}")
        unknown = set(options) - set(_OPTIONS)
        if unknown:
            raise TypeError(f"expected options among {', '.join(_OPTIONS)}; got {', '.join(sorted(unknown))}")
        forward.record_own(name, lambda: head_stats(as_attention_sees(query), as_attention_sees(key), **options))

    def coverage(self) -> Coverage:
        """What was seen so far, what was not, and why."""
        seen = self._training if self._training.rows or not self._evaluating.rows else self._evaluating
        return seen.coverage(self._model, dotted_names(self._model), self._trouble)

    def close(self) -> None:
        """Remove every hook."""
        self._leave()
        self._entries.remove()

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The root's forward begins, in eager mode."""
        if self._compiled:
            return
        self._leave()  # a forward that was interrupted by Ctrl-C has not left
        if not self._counts():
            return
        if compiled.has_compiled_parts(self._model):
            self._look(self._model.forward, args, kwargs)
        else:
            self._open()

    def _left(self, well: bool) -> None:
        if not self._compiled:
            self._leave(well)

    def _enter_compiled(self, run: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Something compiled is about to be called; `run` does the same in eager mode."""
        self._leave()
        self._compiled = True  # the hooks of the root may run in it
        if self._counts():
            self._look(run, args, kwargs)

    def _left_compiled(self) -> None:
        self._compiled = False

    def _look(self, run: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before, self._compiled = self._compiled, True
        try:
            self._open()
            compiled.run_unnoticed(run, self._model, args, kwargs)
            self._trouble = ""
            self._leave(well=True)
        except Exception as error:  # the model's own forward is yet to come, and may well succeed
            self._trouble = f"it is compiled, and running it once more in eager mode failed: {error}"
        finally:
            self._compiled = before
            self._leave()

    def _counts(self) -> bool:
        if recomputes_or_captures():
            return False
        if not self._trains() and (self._training.stats or not (self._model.training or torch.is_grad_enabled())):
            return False
        return self._wanted()

    def _trains(self) -> bool:
        return self._model.training and torch.is_grad_enabled()

    def _open(self) -> None:
        if self._places is None:
            self._imported = len(sys.modules)
            self._places = patches.places(self._model)
        self._pending = Seen()
        self._forward = Forward(self._model, self._pending, began=True)
        patches.open_(self._forward, self._places)

    def _leave(self, well: bool = False) -> None:
        """The forward has ended; what it has shown counts if it ended well."""
        forward, self._forward = self._forward, None
        if forward is None:
            return
        patches.close(forward)
        if well:
            (self._training if self._trains() else self._evaluating).take_in(self._pending)
