"""What a folder of images holds: train/ and val/, in each a folder for every class, in it the images of that class."""

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trimtab.errors import DataError

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Listing:
    """The image files of one split, class by class, each class sorted by name.

    Attributes:
        folder: that holds the folders of the classes.
        classes: names of these, sorted.
        labels: (N,), of each file.
        names: the names of all files, joined: a million of them as Python strings would take 100 MB a process.
        ends: (N,), where each of these ends.
        fingerprint: of all names, sizes and times of last change.
        strays: paths, inside the folder, of what is no image by its suffix.
    """

    folder: Path
    classes: tuple[str, ...]
    labels: Ints
    names: bytes
    ends: Ints
    fingerprint: str
    strays: tuple[str, ...]

    def path(self, index: int) -> Path:
        """Where the file of that index lies."""
        start = self.ends[index - 1] if index else 0
        name = os.fsdecode(self.names[start : self.ends[index]])
        return self.folder / self.classes[self.labels[index]] / name


def list_images(folder: Path) -> tuple[Listing, Listing]:
    """List train/ and val/ of a folder. Hidden names (.DS_Store) are passed over; links are followed.

    Raises:
        DataError: there is no such folder, it is not made like that, a class has no images, or the two differ in
            their classes.
    """
    try:
        inside = {entry.name for entry in os.scandir(folder)}
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be listed ({error.strerror}): expected a folder of images") from None
    if not {"train", "val"} <= inside:
        found = ", ".join(sorted(inside)[:5]) or "nothing"
        raise DataError(
            f"{shown(folder)} should hold train/ and val/, with a folder of images for each class in both; it holds "
            f"{shown(found)}"
        )
    train, val = _list_split(folder / "train"), _list_split(folder / "val")
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        differences = [
            f"{len(names):,} only in {where}/: {_first(names)}"
            for where, names in (("train", only_train), ("val", only_val))
            if names
        ]
        raise DataError(f"train/ and val/ of {shown(folder)} must hold the same classes; {'; '.join(differences)}")
    return train, val


def shown(path: str | Path) -> str:
    """A path for people: names that are not UTF-8 keep what is."""
    return os.fsencode(path).decode("utf-8", "replace")


class _ClassFiles(NamedTuple):
    files: list[tuple[bytes, int, int]]  # name, size, time of last change in ns
    strays: list[str]


def _list_split(folder: Path) -> Listing:
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be listed ({error.strerror})") from None
    loose = sorted(entry.name for entry in entries if not entry.is_dir())
    if not classes:
        images = sum(name.lower().endswith(SUFFIXES) for name in loose)
        raise DataError(
            f"{shown(folder)} should hold a folder of images for each class, and has no folders in it"
            + (f"; sort its {images:,} images into such" if images else "")
        )
    with ThreadPoolExecutor(16) as threads:  # the disk, or a server, answers several at once
        listed = list(threads.map(_list_class, (folder / name for name in classes)))
    empty = [name for name, found in zip(classes, listed, strict=True) if not found.files]
    if empty:
        raise DataError(f"classes without an image in {shown(folder)}: {len(empty):,} ({_first(empty)})")
    digest = hashlib.sha256()
    for name, found in zip(classes, listed, strict=True):
        digest.update(repr((os.fsencode(name), found.files)).encode())
    names = [name for found in listed for name, _, _ in found.files]
    counts = [len(found.files) for found in listed]
    return Listing(
        folder=folder,
        classes=tuple(classes),
        labels=np.repeat(np.arange(len(classes)), counts),
        names=b"".join(names),
        ends=np.cumsum([len(name) for name in names]),
        fingerprint=digest.hexdigest(),
        strays=(*loose, *(stray for found in listed for stray in found.strays)),
    )


def _list_class(folder: Path) -> _ClassFiles:
    files, strays = [], []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be listed ({error.strerror})") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        facts = _facts(entry)
        if facts is not None and stat.S_ISDIR(facts.st_mode):
            raise DataError(f"{shown(entry.path)} is a folder in that of a class: images lie directly in the latter")
        if not entry.name.lower().endswith(SUFFIXES):
            strays.append(f"{folder.name}/{entry.name}")
        elif facts is None:  # a link to nowhere: listed, so that it is counted among the unreadable
            files.append((os.fsencode(entry.name), -1, -1))
        else:
            files.append((os.fsencode(entry.name), facts.st_size, facts.st_mtime_ns))
    return _ClassFiles(files, strays)


def _facts(entry: "os.DirEntry[Any]") -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        return None


def _first(names: list[str]) -> str:
    return shown(", ".join(names[:3])) + (", …" if len(names) > 3 else "")
