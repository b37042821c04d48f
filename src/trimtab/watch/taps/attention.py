"""A tap on the attention of a model: every call, by the module that makes it, without touching it."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.watch.coverage import Coverage, Seen
from trimtab.watch.signals import HeadStats, head_stats, merge
from trimtab.watch.taps import compiled, patches
from trimtab.watch.taps.backend import as_attention_sees
from trimtab.watch.taps.entries import Entries
from trimtab.watch.taps.forward import Forward, dotted_names


class AttentionTap:
    """Sees the attention calls of a model's training forwards, from its making until `close`.

    docs/coverage.md has the back-ends that are seen. A call belongs to the innermost module that makes it; the
    second call of the same module in one forward is called "name#2". Counted are forwards in training mode or,
    when a step has none, forwards in eval mode with gradients on. Activations recomputed in the backward are not
    counted. Where something is compiled, a forward of its own, eager and without a trace, shows the attention.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[], bool]) -> None:
        self._model, self._wanted = model, wanted
        self._training, self._evaluating = Seen(), Seen()
        self._trouble = ""
        self._forward: Forward | None = None
        self._places: list[patches.Place] | None = None
        self._compiled = False  # a compiled copy of the model is being called, and was looked at before
        self._imported = 0  # modules in the process when compiled copies and functions were last looked for
        self._entries = Entries(model, self._enter, self._left, self._enter_compiled, self._left_compiled)

    def take(self) -> dict[str, HeadStats]:
        """What was seen since the last time, by module name, in the order of the first forward."""
        calls = self._training.stats or self._evaluating.stats
        self._training.stats, self._evaluating.stats = {}, {}
        if not calls and self._imported != len(sys.modules):  # compiled or imported since, perhaps
            self._imported = len(sys.modules)
            self._entries.renew()
            self._places = None
        # A module whose number of heads changes between forwards is reported with the number it began with.
        return {
            name: merge([stats for stats in found if len(stats.entropy) == len(found[0].entropy)])
            for name, found in calls.items()
        }

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

    def _left(self) -> None:
        if not self._compiled:
            self._leave()

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
        except Exception as error:  # the model's own forward is yet to come, and may well succeed
            self._trouble = f"it is compiled, and running it once more in eager mode failed: {error}"
        finally:
            self._compiled = before
            self._leave()

    def _counts(self) -> bool:
        # Inside a backward this is a recomputation for activation checkpointing, seen already.
        if torch._C._current_graph_task_id() != -1:
            return False
        if not self._model.training and (self._training.stats or not torch.is_grad_enabled()):
            return False
        return self._wanted()

    def _open(self) -> None:
        if self._places is None:
            self._places = patches.places(self._model)
        seen = self._training if self._model.training else self._evaluating
        self._forward = Forward(self._model, seen, began=True)
        patches.open_(self._forward, self._places)

    def _leave(self) -> None:
        forward, self._forward = self._forward, None
        if forward is not None:
            patches.close(forward)
