"""Fetching one file by its address: resumed after an interruption, checked before it is put in its place.

What has come so far lies beside its place under the name + ".part", with the server's mark of that version (its ETag
or date) in ".part.version": a server whose file has changed since sends the whole of it again.
"""

import errno
import gzip
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from trimtab.errors import DataError
from trimtab.tasks.data.data_set import DataFile
from trimtab.tasks.data.folder import checked

ATTEMPTS = 4
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 2**18  # bytes
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers that may be better next time

OnProgress = Callable[[int], None]
"""Called with the bytes of the file that are here so far."""


def fetch(file: DataFile, folder: Path, on_progress: OnProgress | None = None, *, wait: float = 1.0) -> Path:
    """Fetch a file into the data folder, if it is not there and whole already.

    An interrupted fetch, by Ctrl-C or by anything else, goes on where it was when it is called again.

    Args:
        file: what to fetch.
        folder: the data folder.
        on_progress: called as bytes come.
        wait: seconds before the second attempt; twice as long before each further one.

    Returns:
        Where the file lies.

    Raises:
        DataError: it has no address, the server has not got it or not the right one, the network fails `ATTEMPTS`
            times, or the disk is full or cannot be written.
    """
    path = folder / file.path
    if path.exists():
        try:
            checked(path, file)
            return path
        except (DataError, OSError):
            pass  # it is replaced once the right one has come
    if file.url is None:
        raise DataError(f"{file.path} has no address to fetch it from")
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _complete(file, part, on_progress or _ignore, wait)
        _put(file, part, path)
    except OSError as error:  # those of the network have been dealt with
        if error.errno == errno.ENOSPC:
            raise DataError(f"the disk of {folder} is full; free some space and get {file.path} again") from None
        raise DataError(f"{path} cannot be written ({error.strerror or error})") from None
    return path


def _complete(file: DataFile, part: Path, on_progress: OnProgress, wait: float) -> None:
    """Make the part as long as the file is, in a few attempts."""
    here = _size(part)
    if here > file.size:
        _drop(part)
        here = 0
    free = shutil.disk_usage(part.parent).free
    if free < file.size - here:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    reason = ""
    for attempt in range(ATTEMPTS):
        if _size(part) >= file.size:
            return
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))
        reason = _attempt(file, part, on_progress)
    if _size(part) < file.size:
        raise DataError(
            f"{file.url}: {reason}; {_size(part):,} of {file.size:,} bytes are here after {ATTEMPTS} attempts. "
            "Get it again to go on from there"
        )


def _attempt(file: DataFile, part: Path, on_progress: OnProgress) -> str:
    """Ask once for what is missing. Returns what went wrong, if anything is missing still.

    Raises:
        DataError: asking again is no use.
        OSError: the disk.
    """
    assert file.url is not None
    version = _version(part)
    start = _size(part)
    request = urllib.request.Request(file.url, headers={"User-Agent": "trimtab", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if version.exists():
            request.add_header("If-Range", version.read_text(encoding="ascii"))
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the part is as long as the server's file, or longer
            _drop(part)
            return "the server's file is shorter than expected"
        if error.code in _PASSING:
            return f"the server answered {error.code} {error.reason}"
        raise DataError(
            f"{file.url}: the server answered {error.code} {error.reason}; the file has moved, or is not for all. "
            f"Copy it to {part.with_suffix('')} from elsewhere"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        return f"no connection ({getattr(error, 'reason', error)})"
    with answer:
        if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            _drop(part)
            return "the server sent another part than it was asked for"
        total = _total(answer)
        if total is not None and total != file.size:
            _drop(part)
            raise DataError(
                f"{file.url} is not the file that is expected: it has {total:,} bytes instead of {file.size:,}"
            )
        _remember(answer, version)
        with part.open("ab" if answer.status == 206 else "wb") as out:
            try:
                _copy(answer, out, file, on_progress)
            except _NetworkError as error:
                return f"the connection broke ({error})"
    return "the connection ended early"


def _total(answer: http.client.HTTPResponse) -> int | None:
    """How long the server says that the whole file is, if it does."""
    name, pattern = ("Content-Range", r".*/(\d+)") if answer.status == 206 else ("Content-Length", r"(\d+)")
    found = re.fullmatch(pattern, answer.headers.get(name, ""))
    return int(found[1]) if found else None


def _remember(answer: http.client.HTTPResponse, version: Path) -> None:
    """Keep the server's mark of this version for `If-Range`."""
    mark = answer.headers.get("ETag", "")
    if not mark.startswith('"'):  # a weak one, W/"...", does not promise the same bytes
        mark = answer.headers.get("Last-Modified", "")
    if mark and mark.isascii():
        version.write_text(mark, encoding="ascii")
    else:
        version.unlink(missing_ok=True)


class _NetworkError(Exception):
    """Reading from the server failed: told apart from a disk that fails."""


def _copy(answer: http.client.HTTPResponse, out: IO[bytes], file: DataFile, on_progress: OnProgress) -> None:
    """Write what comes, and no more than a byte beyond the file's size."""
    while out.tell() <= file.size:
        try:
            content = answer.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _NetworkError(error) from None
        if not content:
            return
        out.write(content[: file.size + 1 - out.tell()])
        on_progress(min(out.tell(), file.size))


def _put(file: DataFile, part: Path, path: Path) -> None:
    """Check the part and put it in its place; one that is not what it should be is removed."""
    digest = hashlib.sha256()
    with part.open("rb") as content:
        while block := content.read(_CHUNK):
            digest.update(block)
    if digest.hexdigest() != file.sha256:
        size = _size(part)
        _drop(part)
        raise DataError(
            f"{file.url} is not the file that is expected: sha256 {file.sha256} of {file.size:,} bytes; "
            f"got {digest.hexdigest()} of {size:,}. What came has been removed"
        )
    ready = _packed(part, path) if file.packed else part
    with ready.open("rb") as content:
        os.fsync(content.fileno())
    ready.replace(path)
    _drop(part)


def _packed(part: Path, path: Path) -> Path:
    """A gzip of the part, beside it."""
    ready = path.with_name(f"{path.name}.packed")
    try:
        with part.open("rb") as content, ready.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as out:
            shutil.copyfileobj(content, out, _CHUNK)
    except OSError:
        ready.unlink(missing_ok=True)
        raise
    return ready


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version(part).unlink(missing_ok=True)


def _version(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _ignore(_: int) -> None:
    """Tell nobody."""
