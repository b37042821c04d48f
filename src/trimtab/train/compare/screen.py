"""What a person sees of a compare: a live table of the grid in a terminal, a line for each run that ends elsewhere."""

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import median
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from trimtab.report.terminal import duration
from trimtab.train.compare.grid import RunPlace
from trimtab.train.compare.running import Failure
from trimtab.train.live_view import LiveView
from trimtab.train.progress import Progress, Result
from trimtab.train.screen import title

_FAILURES = 3  # the latest that are shown below the table


class GridScreen(LiveView):
    """Shows the runs of a compare as they go on; a context manager, whose `show` is the compare's `on_news`.

    Args:
        places: the planned runs.
        folder: the compare's.
        console: where they are shown.
        kept: the names of those that had come to their end before.
    """

    def __init__(self, places: Sequence[RunPlace], folder: Path, console: Console, kept: Collection[str] = ()) -> None:
        super().__init__(console)
        self._folder = folder
        self._recipes = {place.name: place.recipe for place in places}
        self._arms = list(dict.fromkeys(place.arm for place in places))
        self._lrs = sorted({place.recipe.lr for place in places})
        self._cells: dict[tuple[str, float], list[str]] = {}
        for place in places:
            self._cells.setdefault((place.arm, place.recipe.lr), []).append(place.name)
        self._news: dict[str, Progress | Result | Failure] = {}
        self._kept = set(kept)
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        return super().__enter__()

    @property
    def failures(self) -> dict[str, Failure]:
        """The runs that failed, by name."""
        return {name: news for name, news in self._news.items() if isinstance(news, Failure)}

    @property
    def ended(self) -> list[str]:
        """The names of the runs that have come to their end."""
        return [name for name, news in self._news.items() if _has_ended(news)]

    def show(self, name: str, news: Progress | Result | Failure) -> None:
        """Take note of how a run goes."""
        self._news[name] = news
        if not isinstance(news, Progress) and name not in self._kept and not self._console.is_interactive:
            number = f"{len(self.ended)}/{len(self._recipes)}"
            left = self._left()
            text = f"{number}  {name}: {_ending(news)}" + (f"  {left}" if left else "")
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _left(self) -> str:
        """The time left in words, from the first end of a run on."""
        mine = set(self._recipes) - self._kept
        if not any(name in mine for name in self.ended):
            return ""
        done = sum(_share(self._news.get(name)) for name in mine)
        seconds = (len(mine) - done) * (time.monotonic() - self._start) / done
        return f"about {duration(seconds)} left" if done < len(mine) else ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One frame, for the console's width and encoding."""
        left = self._left()
        ended = f"{len(self.ended)} of {len(self._recipes)} runs" + (f", {left}" if left else "")
        yield title(str(self._folder), ended, options.max_width)
        table = self._table(brief=False)
        if console.measure(table, options=options.update(max_width=10_000)).maximum > options.max_width:
            table = self._table(brief=True)
        yield table
        what = self._what()
        yield Text(f"median {what} of the runs that ended; x diverged, ! failed", style="dim")
        for name, failure in list(self.failures.items())[: -_FAILURES - 1 : -1]:
            yield Text(f"failed: {name}: {failure.error}", style="red", no_wrap=True, overflow="ellipsis")

    def _what(self) -> str:
        names = {news.metric for news in list(self._news.values()) if isinstance(news, Result) and news.metric}
        return names.pop() if len(names) == 1 else "loss" if not names else "metric"

    def _table(self, brief: bool) -> Table:
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("learning rate", no_wrap=True, overflow="ellipsis", min_width=6)
        columns = [[self._cell(arm, lr, brief) for arm in self._arms] for lr in self._lrs]
        for lr, cells in zip(self._lrs, columns, strict=True):
            width = max(cell.cell_len for cell in cells)  # when there is no room, it is the names that lose
            table.add_column(f"{lr:g}", justify="right", no_wrap=True, min_width=width)
        for arm, *cells in zip(self._arms, *columns, strict=True):
            table.add_row(Text(arm), *cells)
        return table

    def _cell(self, arm: str, lr: float, brief: bool) -> Text:
        return _cell([self._news.get(name) for name in self._cells.get((arm, lr), [])], brief)


def _cell(runs: Sequence[Progress | Result | Failure | None], brief: bool) -> Text:
    """The runs of one arm at one learning rate: their median, how many of them have ended, and how badly."""
    results = [run for run in runs if isinstance(run, Result) and _has_ended(run)]
    diverged = sum(result.status == "diverged" for result in results)
    failed = sum(isinstance(run, Failure) for run in runs)
    active = [run for run in runs if isinstance(run, Progress)]
    parts = [_number(median(map(_value, results)))] if results else []
    if active and not results:
        parts.append(f"{max(map(_share, active)):.0%}")
    if results and len(results) + failed < len(runs) and not brief:
        parts.append(f"{len(results) + failed}/{len(runs)}")
    for count, mark in ((diverged, "x"), (failed, "!")):
        if count:
            parts.append(mark if brief else f"{count}{mark}")
    style = "red" if failed else "yellow" if diverged else "cyan" if active else "" if parts else "dim"
    return Text(" ".join(parts) or "·", style=style)


def _ending(news: Result | Failure) -> str:
    if isinstance(news, Failure):
        return f"failed: {news.kind}: {news.error}"
    if not _has_ended(news):
        return f"stopped and saved at step {news.steps}"
    name = news.metric or "loss"
    return f"{news.status}, {name} {_number(_value(news))}, {duration(news.seconds)}"


def _value(result: Result) -> float:
    """The metric that decides, or the loss."""
    return float(result.metrics.get(result.metric or "", result.loss))


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.2g}"


def _share(news: Progress | Result | Failure | None) -> float:
    """How much of a run is done, 0 to 1."""
    if isinstance(news, Progress):
        return news.step / news.steps
    return float(news is not None and _has_ended(news))


def _has_ended(news: Progress | Result | Failure) -> bool:
    return isinstance(news, Failure) or (isinstance(news, Result) and news.status != "interrupted")
