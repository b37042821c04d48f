"""Texts by name or path, in three parts: one to learn from, one to decide by, one for the end."""

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from trimtab.errors import DataError
from trimtab.tasks.data import DATA_SETS, data_folder, read_data
from trimtab.words import nearest

_NAMES = {"train": ("train",), "validation": ("valid", "validation", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Text:
    """A text in UTF-8 that is read line by line, as often as it is iterated over; it is never whole in memory.

    Each line ends with a newline, the last one too; a carriage return before it is left out, and so is a mark of the
    byte order at the file's begin.

    Attributes:
        name: for errors.
        open: opens it, unpacked.
        first: byte at which it begins.
        end: byte before which it ends; None for the file's end.
    """

    name: str
    open: Callable[[], IO[bytes]]
    first: int = 0
    end: int | None = None

    def __iter__(self) -> Iterator[str]:
        """The lines, each with its newline.

        Raises:
            DataError: one is no UTF-8, or the file cannot be read or unpacked.
        """
        place = self.first
        with _readable(self.name), self.open() as file:
            file.seek(self.first)
            for number, line in enumerate(file, 1):
                if self.end is not None and place >= self.end:
                    return
                place += len(line)
                yield self._decoded(line, number)

    def _decoded(self, line: bytes, number: int) -> str:
        try:
            text = line.decode("utf-8").removesuffix("\n").removesuffix("\r") + "\n"
        except UnicodeDecodeError:
            begin = f", counted from byte {self.first:,}," if self.first else ""
            raise DataError(
                f"line {number} of {self.name}{begin} is no UTF-8 text: convert the file to UTF-8"
            ) from None
        return text if self.first or number > 1 else text.removeprefix("\ufeff")


@dataclass(frozen=True)
class Texts:
    """The parts of a data set.

    Attributes:
        name: what to call it.
        checksum: of the content of all its files.
        train: what is learned from, the vocabulary too.
        validation: what decides.
        test: what is measured at the end; None if there is none.
    """

    name: str
    checksum: str
    train: Text
    validation: Text
    test: Text | None


def find_texts(data: str) -> Texts:
    """The texts of a name or path.

    Args:
        data: "tinyshakespeare", "wikitext-2"; "wikitext-103", of which the data folder must hold the files; the path of
            a text file; or that of a folder with a file for each part, named train, valid (or validation, val, dev) and
            test, as in wiki.train.tokens or valid.txt.gz. The last may be missing. A single file is cut at the first
            ends of lines after 90 and 95 % of its bytes.

    Raises:
        DataError: there is nothing of that name, a part is missing or there twice, or a file cannot be read.
    """
    if data == "tinyshakespeare":
        file = DATA_SETS[data].files[0]
        return _parted(Text(data, lambda: io.BytesIO(read_data(DATA_SETS[data], "input.txt.gz"))), data, file.sha256)
    if data == "wikitext-2":
        files = {file.path.rpartition("/")[2]: file for file in DATA_SETS[data].files}
        train, valid, test = (_of_set(data, f"{part}.txt.gz") for part in ("train", "valid", "test"))
        return Texts(data, "".join(file.sha256 for file in files.values()), train, valid, test)
    path = data_folder() / data if data == "wikitext-103" else Path(data).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return _parted(_of_file(path), path.stem, _checksum([path]))
    if data == "wikitext-103":
        raise DataError(f"{path} is missing: put wikitext-103's files there, wiki.train.tokens, wiki.valid.tokens ...")
    names = ("tinyshakespeare", "wikitext-2", "wikitext-103")
    raise DataError(
        f"there is no text {data!r}.{nearest(data, names)} Expected {', '.join(names)}, or the path of a text file or "
        "of a folder with train, valid and test files"
    )


def _of_set(data: str, file: str) -> Text:
    return Text(f"{data}'s {file}", lambda: io.BytesIO(gzip.decompress(read_data(DATA_SETS[data], file))))


def _of_file(path: Path) -> Text:
    def opened() -> IO[bytes]:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return gzip.open(path) if packed else path.open("rb")  # type: ignore[return-value]  # one in all but name

    return Text(str(path), opened)


def _of_folder(folder: Path) -> Texts:
    found: dict[str, list[Path]] = {part: [] for part in _NAMES}
    for path in sorted(folder.iterdir()):
        words = set(re.split(r"[._-]", path.name.lower()))
        for part, names in _NAMES.items():
            if path.is_file() and not path.name.startswith(".") and words.intersection(names):
                found[part].append(path)
    for part, paths in found.items():
        if len(paths) > 1 or (not paths and part != "test"):
            called = " or ".join(_NAMES[part])
            seen = ", ".join(path.name for path in paths) or "none"
            raise DataError(
                f"{folder} needs one file for {part}, called {called} with dots, dashes or underscores around, such as "
                f"{_NAMES[part][0]}.txt; it has {seen}"
            )
    parts = {part: _of_file(paths[0]) for part, paths in found.items() if paths}
    files = [path for paths in found.values() for path in paths]
    return Texts(folder.name, _checksum(files), parts["train"], parts["validation"], parts.get("test"))


def _checksum(paths: list[Path]) -> str:
    digests = []
    for path in paths:
        with _readable(str(path)), path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return "".join(digests)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Tell by name of a file that cannot be read."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is damaged: its gzip cannot be unpacked ({error})") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror or error})") from None


def _parted(text: Text, name: str, checksum: str) -> Texts:
    """Cut a text at the ends of lines after 90 and 95 % of its bytes."""
    with _readable(text.name), text.open() as file:
        size, cuts = file.seek(0, io.SEEK_END), []
        for share in (90, 95):
            file.seek(size * share // 100)
            file.readline()
            cuts.append(file.tell())
    first, second = cuts
    if not size:
        raise DataError(f"{text.name} is empty")
    if not first < second < size:
        raise DataError(
            f"{text.name} has {size:,} bytes in too few lines to be cut at the ends of lines, after 90 and 95 % of "
            "them: take a longer text, or give a folder with a file for each part, train.txt, valid.txt and test.txt"
        )
    return Texts(
        name,
        checksum,
        replace(text, end=first),
        replace(text, first=first, end=second),
        replace(text, first=second),
    )
