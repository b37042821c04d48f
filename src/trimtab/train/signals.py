"""Ctrl-C and SIGTERM: a run finishes its step and saves before it stops."""

import signal
import threading
import time
from types import FrameType, TracebackType


class Interruption:
    """Notes SIGINT and SIGTERM in place of dying of them, as a context manager; a second SIGINT is a KeyboardInterrupt.

    Other threads than the main one cannot ask for signals; there it never notes any.

    Args:
        patience: seconds after the first signal in which a SIGINT does not count as a second one: torchrun hands the
            terminal's Ctrl-C on to processes that have it from the terminal already.

    Attributes:
        asked: whether the run was asked to stop.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self.asked = False
        self._patience = patience
        self._first = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: the handler before was not set from Python, and cannot be set again from there.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and number == signal.SIGINT and now - self._first >= self._patience:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._first = True, now
