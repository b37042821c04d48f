"""What a person sees of one run: a live table in a terminal, a line for each logged step elsewhere."""

import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trimtab.report.sparkline import ASCII_BARS, BARS, sparkline
from trimtab.report.terminal import duration
from trimtab.train.live_view import LiveView
from trimtab.train.progress import Progress
from trimtab.train.signals import Interruption

_POINTS = 200  # of a curve, the latest: no terminal shows more, and a frame must stay cheap
_ALARMS = 3  # the latest, the newest in full


class RunScreen(LiveView):
    """Shows one run as it goes on; a context manager, whose `show` is the run's `on_step`.

    Args:
        folder: the run's.
        console: where it is shown.
        seconds: the time that the run may take, if there is such a limit.
        started_at: the step after which it goes on, 0 for one from the start.
    """

    def __init__(self, folder: Path, console: Console, seconds: float | None = None, started_at: int = 0) -> None:
        super().__init__(console)
        self._folder, self._limit, self._started_at = folder, seconds, started_at
        self._first: Progress | None = None
        self._now: Progress | None = None
        self._arrived = 0.0
        # Tuples, replaced as a whole: the thread that draws reads them while training goes on.
        self._curves: dict[str, tuple[float, ...]] = {}

    def show(self, now: Progress) -> None:
        """Take note of a logged step."""
        if self._first is None:
            self._first = now
            if self._started_at:
                self._print(f"continues at step {self._started_at:,}")
        told, before = (len(self._now.alarms), self._now.metrics) if self._now else (0, {})
        metrics = now.metrics if now.metrics != before else {}  # those of an earlier step are not told twice
        for name, value in {"loss": now.loss, "entropy": now.entropy_min, **metrics}.items():
            if value is not None:
                self._curves[name] = (*self._curves.get(name, ()), value)[-_POINTS:]
        self._now, self._arrived = now, time.monotonic()  # last: what a frame shows of it has a curve
        if not self._console.is_interactive:
            self._print(_line(now, metrics, self._left(now)))
            for message in now.alarms[told:]:
                self._print(f"  alarm: {message}")

    def _left(self, now: Progress, waited: float = 0.0) -> str:
        """The time left in words, at the pace seen by this process; none of its first step, which is a slow one."""
        first = self._first
        left = math.inf if self._limit is None else self._limit - now.seconds
        if first is not None and first.step < now.step:
            pace = (now.seconds - first.seconds) / (now.step - first.step)
            left = min(left, (now.steps - now.step) * pace)
        return f"{duration(max(0.0, left - waited))} left" if math.isfinite(left) else ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One frame, for the console's width, height and encoding."""
        now, width = self._now, options.max_width
        if now is None:
            yield title(str(self._folder), "getting ready", width)
            return
        left = "stopping after this step" if _asked_to_stop() else self._left(now, time.monotonic() - self._arrived)
        step = f"step {now.step:,} of {now.steps:,}"
        yield title(str(self._folder), f"{step}, {left}" if left else step, width)
        bar = Table.grid()  # alone it would not end its line
        bar.add_row(ProgressBar(total=now.steps, completed=now.step, width=width))
        yield bar
        yield self._numbers(now, width, ASCII_BARS if options.ascii_only else BARS)
        yield from _alarms(now.alarms)

    def _numbers(self, now: Progress, width: int, bars: str) -> Table:
        """One line a number: its name, its value now, and its course."""
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_column(no_wrap=True, min_width=8)
        table.add_column(no_wrap=True, overflow="ellipsis")
        room = max(8, width - 36)  # what the longest label and number leave

        def add(label: str, value: str, curve: str = "", beside: str = "") -> None:
            table.add_row(Text(label, style="dim"), value, Text(curve, style="cyan") + Text(beside, style="dim"))

        add("loss", f"{now.loss:.4g}", sparkline(self._curves["loss"], room, bars))
        for name, value in now.metrics.items():
            add(name, f"{value:.4g}", sparkline(self._curves[name], room, bars))
        if now.entropy_min is not None:
            head = shortened(now.worst_head or "", room - 10)
            curve = sparkline(self._curves["entropy"], room - len(head) - 2, bars)
            add("lowest entropy, of 1", f"{now.entropy_min:.3f}", curve + "  ", head)
        add("learning rate", f"{now.lr:.4g}")
        add("samples/s", f"{now.samples_per_second:,.0f}")
        return table

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)


def _line(now: Progress, metrics: Mapping[str, float], left: str) -> str:
    """A logged step in one line."""
    parts = [f"step {now.step}/{now.steps}", f"loss {now.loss:.4f}", f"lr {now.lr:.3g}"]
    parts += [f"{name} {figures(value)}" for name, value in metrics.items()]
    if now.entropy_min is not None and math.isfinite(now.entropy_min):
        parts.append(f"lowest entropy {now.entropy_min:.3f}")
    return "  ".join([*parts, f"{now.samples_per_second:,.0f} samples/s", *([left] if left else [])])


def figures(value: float) -> str:
    """A metric to four decimals, or to four figures when it is large."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


class _Terminal(Console):
    """A console that goes quiet when nobody reads it any more, for instance the `head` or `tee` behind a pipe."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or Python complains of it when it ends


def console(quiet: bool = False) -> Console:
    """The process's terminal. A file or pipe is never drawn on, whatever FORCE_COLOR says.

    A pipe that breaks does not end the run that is shown: what counts is in its folder.
    """
    return _Terminal(quiet=quiet, highlight=False, force_interactive=None if sys.stdout.isatty() else False)


def title(left: str, right: str, width: int) -> Text:
    """Two words on the line, at its ends; the left one gives way."""
    left = shortened(left, width - len(right) - 2)
    return Text.assemble((left, "bold"), " " * (width - len(left) - len(right)), right)


def shortened(name: str, room: int) -> str:
    """A name that is too long without its beginning, which tells less than its end."""
    return name if len(name) <= room else "..." + name[max(0, len(name) + 3 - max(room, 3)) :]


def _asked_to_stop() -> bool:
    """Whether Ctrl-C was pressed and the run is about to save and stop."""
    handler = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    return isinstance(handler, Interruption) and handler.asked


def _alarms(alarms: tuple[str, ...]) -> RenderResult:
    """The latest alarms, newest first: the newest in full, the others as far as a line goes."""
    if not alarms:
        return
    number = "1 alarm" if len(alarms) == 1 else f"{len(alarms)} alarms, the latest first"
    yield Text(number, style="bold red")
    yield Text(alarms[-1])
    for message in alarms[-2 : -_ALARMS - 1 : -1]:
        yield Text(message, style="dim", no_wrap=True, overflow="ellipsis")
