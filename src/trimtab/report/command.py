"""`trimtab report PATH...`."""

import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from trimtab.errors import RunFolderError
from trimtab.report.measures import TOLERANCE
from trimtab.words import parse_words

if TYPE_CHECKING:
    from trimtab.report.collect import Collection

PAGE = "report.html"
_LISTED = 10  # unreadable folders that are named in the terminal


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class ReportOptions:
    """One HTML file that opens offline: the page of a run, or of many runs side by side.

    PATH is a run folder, a compare folder, or a folder that holds either anywhere below. What cannot be read is listed.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...")]
    """Where the runs are."""

    out: Path | None = None
    """The page; by default report.html in the first PATH."""

    csv: Path | None = None
    """Write the table of runs here, and beside it those of the measures and of the differences between arms."""

    parquet: Path | None = None
    """Write the table of runs as parquet."""

    png: Path | None = None
    """Draw loss and metric against the learning rate, one column of a paper wide."""

    tolerance: float = TOLERANCE
    """Of the way from the loss at init to the best loss: what a learning rate may miss and count in the LR range."""

    open: bool = False
    """Open the page in the browser."""


def report_command(words: list[str]) -> int:
    """Run `trimtab report` with these words.

    Returns:
        The exit code: 0 when anything could be read.

    Raises:
        RunFolderError: nothing could be read, or a file cannot be written.
    """
    options = parse_words(ReportOptions, words, prog="trimtab report")
    if not options.paths:
        raise RunFolderError("name at least one folder: trimtab report runs/...")
    if not 0 <= options.tolerance < 1:
        raise RunFolderError(f"--tolerance must be at least 0 and below 1, got {options.tolerance:g}")
    from trimtab.report.collect import collect, nothing_readable

    collection = collect(options.paths)
    if not collection.runs:
        raise RunFolderError(nothing_readable(collection))
    out = options.out or next(path for path in options.paths if path.is_dir()) / PAGE
    try:
        _write(options, out, collection)
    except OSError as error:
        raise RunFolderError(f"cannot write {error.filename or out}: {error.strerror or error}") from None
    for each in collection.unreadable[:_LISTED]:
        print(f"not readable: {each.path}: {each.reason}")
    if len(collection.unreadable) > _LISTED:
        print(f"and {len(collection.unreadable) - _LISTED} more that the page lists")
    print(f"page: {out}")
    if options.open:
        webbrowser.open(out.resolve().as_uri())
    return 0


def _write(options: ReportOptions, out: Path, collection: "Collection") -> None:
    """Write all files that were asked for, and print the numbers."""
    from trimtab.report import export
    from trimtab.report.compare_page import write_collection
    from trimtab.report.comparison import comparisons
    from trimtab.report.measured import measure_all
    from trimtab.report.run_page import summary_line, write_run_page

    if len(collection.runs) == 1:
        run = collection.runs[0]
        write_run_page(run, out)
        print(f"{run.folder}: {summary_line(run)}")
        groups = tuple((group, tuple(measure_all(group, options.tolerance))) for group in comparisons(collection))
    else:
        written = write_collection(collection, out, options.tolerance)
        groups = written.groups
        print(written.summary)
    if options.csv is not None:
        for path in export.write_csv(options.csv, groups):
            print(f"table: {path}")
    if options.parquet is not None:
        export.write_parquet(options.parquet, groups)
        print(f"table: {options.parquet}")
    if options.png is not None:
        export.write_png(options.png, groups[0][0])
        print(f"picture: {options.png}")
