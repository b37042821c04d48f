"""`trimtab inspect FILE`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from trimtab.errors import CheckpointError
from trimtab.inspect.inspection import inspect_checkpoint
from trimtab.inspect.table import WIDTH, Sort, to_strict_json, to_text
from trimtab.words import parse_words

_SLOW = 2**28  # bytes from which on progress is shown


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class InspectOptions:
    """Every weight of a checkpoint, layer by layer: sigma, stable rank, q/k energy, embeddings. Runs none of its code.

    FILE is a safetensors file, a file of torch.save, the index of shards of either, a folder that holds one of these,
    or a torch.distributed.checkpoint folder.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The checkpoint."""

    json: bool = False
    """Print JSON, with every number, instead of the table."""

    html: Path | None = None
    """Write a picture too: one self-contained HTML file."""

    key: str | None = None
    """Where the model's state dict is in a file that holds more: model or state.ema. Looked for by default."""

    num_heads: int | None = None
    """Attention heads; if not given, what config.json beside the file says, or the arguments saved with the model."""

    num_kv_heads: int | None = None
    """Heads of keys and values, where there are fewer of them; needed for fused weights only."""

    top: int = 1
    """How many singular values count as the top for the q/k energy."""

    sort: Sort = "layer"
    """Order of the table: layer by layer, largest sigma first, smallest stable rank first, or by name."""


def inspect_command(words: list[str]) -> int:
    """Run `trimtab inspect` with these words and return the exit code.

    Raises:
        CheckpointError: the checkpoint cannot be inspected, or the page cannot be written.
    """
    options = parse_words(InspectOptions, words, prog="trimtab inspect")
    with _progress() as on_tensor:
        report = inspect_checkpoint(
            options.file,
            key=options.key,
            num_heads=options.num_heads,
            num_kv_heads=options.num_kv_heads,
            top=options.top,
            on_tensor=on_tensor,
        )
    if options.html is not None:
        from trimtab.inspect.page import write_page

        try:
            write_page(report, options.html)
        except OSError as error:
            raise CheckpointError(f"cannot write {options.html}: {error.strerror or error}") from None
    if options.json:
        print(to_strict_json(report))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = WIDTH  # a pipe has no width of its own
        console.print(to_text(report, options.sort, console.width), soft_wrap=not console.is_terminal)
    if options.html is not None:
        print(f"page: {options.html}", file=sys.stderr if options.json else sys.stdout)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callback that shows, on stderr, how far a big checkpoint has been read."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("reading", total=None)
    started = False

    def show(name: str, read: int, size: int) -> None:
        nonlocal started
        if size < _SLOW:
            return
        if not started:
            bar.start()
            started = True
        bar.update(task, completed=read, total=size, description=name[-50:])

    try:
        yield show
    finally:
        if started:
            bar.stop()
