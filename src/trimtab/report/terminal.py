"""`trimtab watch FOLDER`: a run as it goes, in the terminal. It reads the run folder and nothing else."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trimtab.errors import RunFolderError
from trimtab.report.runlog import number
from trimtab.report.sparkline import ASCII_BARS, BARS, sparkline
from trimtab.report.tail import Tail, read_more
from trimtab.words import parse_words

_WIDE = 110  # columns from which the two tables stand beside each other
_GAP = 3  # columns between them
_ROWS = 10  # of a table, at most
_POLL = 1.0  # seconds from one look at the folder to the next: a frame costs some 10 ms


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class WatchOptions:
    """Show a run in the terminal, also while it is going on in another process."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The run folder; one that is not there yet is waited for."""

    once: bool = False
    """Print what is there now and leave. So it is, too, when the output is no terminal."""


def watch_command(words: Sequence[str]) -> int:
    """Run `trimtab watch`.

    Args:
        words: what follows `watch` on the command line.

    Returns:
        The exit code: 0, also after Ctrl-C, which is how one leaves.

    Raises:
        RunFolderError: the folder holds no run that could be shown.
    """
    options = parse_words(WatchOptions, words, prog="trimtab watch")
    console = Console()
    if options.once or not console.is_terminal:
        show(options.folder, console)
    else:
        follow(options.folder, console)
    return 0


def show(folder: Path, console: Console) -> None:
    """Print one frame of what is logged until now.

    Raises:
        RunFolderError: nothing is logged there.
    """
    tail = read_more(Tail(folder))
    if not tail.last:
        missing = "has no logged step yet" if tail.info else "holds no run (no run.json)"
        raise RunFolderError(f"{folder} {missing}; without --once, in a terminal, `trimtab watch` waits for it")
    console.print(Frame(tail, time.time(), whole=True))


def follow(folder: Path, console: Console, sleep: Callable[[float], object] = time.sleep) -> None:
    """Show the run live until its result is there or Ctrl-C is pressed; the last frame stays on the screen."""
    tail = read_more(Tail(folder))
    with Live(Frame(tail, time.time()), console=console, auto_refresh=False) as live:
        try:
            while not tail.result:
                sleep(_POLL)
                tail = read_more(tail)
                live.update(Frame(tail, time.time()), refresh=True)
        except KeyboardInterrupt:
            return


class Frame:
    """One picture of a run, for `rich` to print in the columns and lines there are.

    Args:
        tail: the run as far as it has been read.
        now: seconds since the epoch.
        whole: take as many lines as it needs, as on paper, instead of fitting the screen.
    """

    def __init__(self, tail: Tail, now: float, whole: bool = False) -> None:
        self._tail, self._now, self._whole = tail, now, whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Compose the frame for the console's width, height and encoding."""
        tail, width = self._tail, options.max_width
        if not tail.last:
            what = "no step is logged yet" if tail.info else "there is no run yet"
            yield Text(f"{tail.folder}: {what}. Waiting; Ctrl-C leaves.")
            return
        height = 1000 if self._whole else options.size.height
        curves = _curves(tail, width, ASCII_BARS if options.ascii_only else BARS)
        left = height - curves.row_count - 3  # lines for the alarms and the tables: title, blank and cursor taken off
        alarms = _alarms(tail.alarms, console, width, min(left - 8, left * 2 // 3))
        left -= sum(lines for _, lines in alarms)

        wide = width >= _WIDE
        widths = (width * 3 // 5 - _GAP, width * 2 // 5) if wide else (width, width)
        rows = max(1, min(_ROWS, left - 2 if wide else (left - 4) // 2))  # a blank line and a header to each table
        tables = [table for table in (_heads(tail, rows, widths[0]), _sigmas(tail, rows, widths[1])) if table]

        yield _title(tail, self._now)
        yield Text()
        yield curves
        if wide and tables:
            yield Text()
            yield _beside(tables)
        else:
            for table in tables:
                yield Text()
                yield table
        yield from (text for text, _ in alarms)


def _title(tail: Tail, now: float) -> Table:
    recipe = tail.info.get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, dict) else None
    step = f"step {tail.last['step']:,}" + (f" of {steps:,}" if isinstance(steps, int) else "")
    title = Table.grid(expand=True)
    title.add_column(no_wrap=True, overflow="ellipsis")
    title.add_column(justify="right", no_wrap=True)
    title.add_row(Text(str(tail.folder), style="bold"), Text.assemble(step, ", ", _state(tail, now)))
    return title


def _state(tail: Tail, now: float) -> Text:
    """How the run ended, or how long ago its last line was written."""
    status = tail.result.get("status", "finished") if tail.result else None
    if status is not None:
        return Text(str(status), style="bold green" if status == "finished" else "bold red")
    waited = max(0.0, now - tail.written)
    usual = [after - before for before, after in zip(tail.times, tail.times[1:], strict=False)]
    if waited > 10 and waited > 3 * median(usual or [0.0]):
        return Text(f"no new line for {duration(waited)}", style="bold yellow")
    return Text(f"last line {duration(waited)} ago")


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "3 min", "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _curves(tail: Tail, width: int, bars: str) -> Table:
    """One line a number: its name, its value now, and its course."""
    last = tail.last
    labels = {
        "loss": "loss",
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "entropy_min": "lowest entropy, of 1",
        "entropy_mean": "mean entropy, nats",
        "max_logit": "largest logit",
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(no_wrap=True)
    room = max(8, width - 35)  # what the longest label and number leave
    for name, label in labels.items():
        if name in last:
            curve = Text(sparkline(tail.curves[name], room, bars), style="cyan")
            table.add_row(Text(label, style="dim"), _text(last[name]), curve)
    return table


def _heads(tail: Tail, rows: int, width: int) -> Table | None:
    """The heads with the lowest entropy."""
    seen = sorted((head for head in tail.heads if head.normalized >= 0), key=lambda head: head.normalized)
    cells = [(head.name, _text(head.normalized), _text(head.entropy), _text(head.max_logit)) for head in seen[:rows]]
    header = (f"lowest entropy, {len(seen)} heads", "of 1", "nats", "largest logit")
    return _table(header, cells, width) if seen else None


def _sigmas(tail: Tail, rows: int, width: int) -> Table | None:
    """The weights with the largest sigma; of a fused weight the largest of its blocks."""
    sigmas = {name: max(map(float, blocks)) for name, blocks in tail.last.get("sigma", {}).items()}
    gammas = {name: max(map(float, blocks)) for name, blocks in tail.last.get("gamma", {}).items()}
    order = sorted(sigmas, key=lambda name: math.inf if math.isnan(sigmas[name]) else sigmas[name], reverse=True)
    cells = [(name, _text(sigmas[name]), _text(gammas.get(name)))[: 3 if gammas else 2] for name in order[:rows]]
    header = (f"largest sigma, {len(sigmas)} weights", "sigma", "gamma")[: 3 if gammas else 2]
    return _table(header, cells, width) if sigmas else None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A plain table; a name in its first column that is too long loses its beginning."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False, width=width)
    table.add_column(header[0], no_wrap=True, ratio=1)
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    numbers = [max(map(len, column)) for column in list(zip(header, *rows, strict=True))[1:]]
    room = max(8, width - sum(numbers) - 2 * len(numbers))
    for name, *others in rows:
        table.add_row(Text(name if len(name) <= room else "..." + name[3 - room :]), *others)
    return table


def _beside(tables: Sequence[Table]) -> Table:
    grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
    grid.add_row(*tables)
    return grid


def _alarms(
    alarms: Sequence[dict[str, Any]], console: Console, width: int, room: int
) -> list[tuple[RenderableType, int]]:
    """The latest alarms, newest first, each with its advice; beside every part the lines it takes, `room` in all."""
    if not alarms:
        return []
    number_of = "1 alarm" if len(alarms) == 1 else f"{len(alarms)} alarms, the latest first"
    parts: list[tuple[RenderableType, int]] = [(Text(), 1), (Text(number_of, style="bold red"), 1)]
    for alarm in alarms[:-4:-1]:
        text = Text(str(alarm.get("message", "")))
        lines = len(text.wrap(console, width))
        if len(parts) > 2 and sum(lines for _, lines in parts) + lines > room:
            break  # the newest is shown whatever it takes
        parts.append((text, lines))
    return parts


def _text(value: Any) -> str:
    """A logged value to four figures; empty when there is none."""
    return "" if value is None else f"{number(value):.4g}"
