"""One forward of a model while it is watched: which module is running, and what attention it calls."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from trimtab.watch.coverage import ROOT, Seen
from trimtab.watch.signals import HeadStats
from trimtab.watch.taps import returned
from trimtab.watch.taps.backend import BackEnd, Call

# Wrappers that hold a module under a name of their own.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class Mark(NamedTuple):
    """How things stood when a module began."""

    depth: int
    calls: int


class Forward:
    """One forward of a model or, with `observe`, several.

    Attributes:
        thread: the thread it runs in; calls of others are none of its own.
        calls: attention calls so far.
        busy: whether a call is being measured: what measuring calls is not the model's.
    """

    def __init__(self, model: nn.Module, seen: Seen, *, began: bool) -> None:
        self.thread, self.calls, self.busy = threading.get_ident(), 0, False
        self._names, self._seen = dotted_names(model), seen
        self._inside = [ROOT] if began else []  # names of the modules that are running, outermost first
        self._seen.ran.update(self._inside)
        self._count: Counter[str] = Counter()

    def knows(self, module: nn.Module) -> bool:
        """Whether the module is one of the model's."""
        return id(module) in self._names

    def enter(self, module: nn.Module) -> Mark:
        """A module of the model begins."""
        if not self._inside:
            self._count.clear()
        mark = Mark(len(self._inside), self.calls)
        name = self._names[id(module)]
        self._inside.append(name)
        self._seen.ran.add(name)
        return mark

    def leave(self, mark: Mark) -> None:
        """It has ended, well or not."""
        del self._inside[mark.depth :]

    def returned(self, mark: Mark, result: Any) -> None:
        """It has returned: perhaps its attention weights, where no attention was seen in it."""
        if self.calls == mark.calls and returned.weights_in(result) is not None:
            self._measured(self._inside[-1], returned.BACK_END, lambda: returned.measure(result), may_be_other=True)

    def record(self, back_end: BackEnd, call: Call) -> None:
        """A module, the running one unless the call tells another, has called attention."""
        if self._inside:  # else the model is not running: with `observe`, somebody else's attention
            name = self._inside[-1]
            with suppress(Exception):  # it is a name: training goes on
                name = self._names.get(id(back_end.owner(call)), name)
            self._measured(name, back_end, lambda: back_end.measure(call))

    def record_own(self, name: str | None, measure: Callable[[], HeadStats]) -> None:
        """Attention the program itself tells of; what `measure` raises reaches it."""
        with self._measuring():
            stats = measure()
        module = self._inside[-1] if self._inside else ROOT
        self._seen.told.add(module)
        self._seen.add(self._numbered(name or module), "watch.attention", stats, "")

    def _measured(
        self, name: str, back_end: BackEnd, measure: Callable[[], HeadStats], *, may_be_other: bool = False
    ) -> None:
        try:
            with self._measuring():
                stats = measure()
        except Exception as error:  # whatever it is, training goes on: the model's own call went well
            if may_be_other:
                self._seen.hints[name] = str(error)
            else:
                self._seen.miss(self._numbered(name), back_end.name, str(error) or type(error).__name__)
        else:
            self._seen.add(self._numbered(name), back_end.name, stats, back_end.note)

    def _numbered(self, name: str) -> str:
        self.calls += 1
        self._count[name] += 1
        return name if self._count[name] == 1 else f"{name}#{self._count[name]}"

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        self.busy = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.busy = False


def dotted_names(model: nn.Module) -> dict[int, str]:
    """The name of every module by its id, as if nothing had been wrapped for compiling or distributing."""
    plain = plain_name(model)
    return {id(module): plain(name) or ROOT for name, module in model.named_modules()}


def plain_name(model: nn.Module) -> Callable[[str], str]:
    """What makes of a dotted name in a model the name it would have without the wrappers."""
    data_parallel = type(model).__name__ in ("DistributedDataParallel", "DataParallel")

    def plain(name: str) -> str:
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        return ".".join(parts[1:] if data_parallel and parts[0] == "module" else parts)

    return plain
