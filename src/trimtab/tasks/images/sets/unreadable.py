"""The files of a folder that cannot be read: found by decoding each once, counted and named, never silently skipped."""

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from trimtab.errors import DataError
from trimtab.tasks.data.folder import cache_folder
from trimtab.tasks.data.prepare import Arrays, prepared
from trimtab.tasks.images.sets.decoding import threads, what_is_wrong
from trimtab.tasks.images.sets.listing import Listing, shown

_FORMAT = "unreadable 1"  # changes with what is found wrong
_PATIENCE = 24 * 3600  # seconds; a large folder takes its time, and other processes wait for the first
_AHEAD = 1024  # files that wait for a thread

_log = logging.getLogger("trimtab")

Unreadable = dict[int, str]
"""Why a file cannot be read, by its index in the listing."""


def find_unreadable(name: str, listings: tuple[Listing, Listing]) -> tuple[Unreadable, Unreadable]:
    """What cannot be read in each of two listings.

    Every file is decoded the first time, and all again when a name, a size or a time of last change is another. Those
    that could not be read then are tried each time.

    Args:
        name: of the folder, for people who look into the cache.
        listings: the training and the test files.
    """

    def make() -> Arrays:
        found = [decode_all(listing) for listing in listings]
        return {"unreadable": np.frombuffer(json.dumps(found).encode(), np.uint8)}

    arrays = prepared(name, [_FORMAT, *(listing.fingerprint for listing in listings)], make, _PATIENCE)
    train, test = json.loads(arrays["unreadable"].tobytes())
    return _still(listings[0], map(int, train)), _still(listings[1], map(int, test))


def decode_all(listing: Listing) -> Unreadable:
    """Decode every file of a listing, in threads; on a terminal, one line tells how far it is."""
    return _still(listing, iter(range(len(listing.labels))), f"looking at {shown(listing.folder)}")


def refuse(name: str, folder: Path, unreadable: list[tuple[Path, str]]) -> DataError:
    """The error for a folder with unreadable files, which counts them and names the first; the cache has them all."""
    path = cache_folder() / "unreadable" / f"{name}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{shown(file)}: {why}\n" for file, why in unreadable), encoding="utf-8")
        everything = f" All of them: {path}."
    except OSError:
        everything = ""
    return DataError(
        f"{shown(folder)} has {_counted(unreadable)}.{everything} Replace or delete them, or leave them out with "
        "--skip-unreadable"
    )


def warn_of_skipped(folder: Path, unreadable: list[tuple[Path, str]]) -> None:
    """Say which files are left out, as was asked for."""
    _log.warning("%s: left out %s", shown(folder), _counted(unreadable))


def _counted(unreadable: list[tuple[Path, str]]) -> str:
    first = "; ".join(f"{shown(Path(*file.parts[-3:]))} ({why})" for file, why in unreadable[:3])
    more = f"; and {len(unreadable) - 3:,} more" if len(unreadable) > 3 else ""
    files = "1 file that cannot be read" if len(unreadable) == 1 else f"{len(unreadable):,} files that cannot be read"
    return f"{files}: {first}{more}"


def _still(listing: Listing, indices: Iterator[int], title: str | None = None) -> Unreadable:
    """Those of the files that cannot be read now, in order."""
    bad: Unreadable = {}
    waiting: deque[tuple[int, Future[str | None]]] = deque()
    total, done, began, shown_at = len(listing.labels), 0, time.monotonic(), 0.0
    tell = title is not None and sys.stderr.isatty()
    while True:
        while len(waiting) < _AHEAD and (index := next(indices, None)) is not None:
            waiting.append((index, threads().submit(what_is_wrong, listing.path(index))))
        if not waiting:
            break
        index, result = waiting.popleft()
        why = result.result()
        if why is not None:
            bad[index] = why
        done += 1
        now = time.monotonic()
        if tell and now - shown_at > 0.5:
            shown_at = now
            line = f"{title}: {done:,} of {total:,} images, {done / (now - began):,.0f}/s"
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
    if tell:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return bad
