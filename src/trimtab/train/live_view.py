"""`LiveView`: what the live views of one run and of a grid share."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live


class LiveView(ABC):
    """Draws itself (``__rich_console__`` of its subclass) in a terminal while it is open, and elsewhere nothing.

    Lines printed meanwhile, a warning for instance, go above it.

    Args:
        console: where it is shown.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(get_renderable=lambda: self, console=console, refresh_per_second=2)

    @abstractmethod
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What it shows now."""

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_interactive:
            self._live.stop()
