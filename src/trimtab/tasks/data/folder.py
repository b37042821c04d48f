"""Where data lie, and reading them: every file is checked against its sha256 before anything is made of it."""

import gzip
import hashlib
import os
import zlib
from pathlib import Path

from trimtab.errors import DataError
from trimtab.tasks.data.data_set import DataFile, DataSet

FOLDER_VARIABLE = "TRIMTAB_DATA"
IMAGENET = "imagenet"
"""The folder of ImageNet's images in the data folder, and the name of that data set."""


def cache_folder() -> Path:
    """Where Trimtab keeps what it can make or fetch again: `$XDG_CACHE_HOME/trimtab`, or `~/.cache/trimtab`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


def data_folder() -> Path:
    """Where data sets are fetched to: the folder that `TRIMTAB_DATA` names, or `data` in the cache."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else cache_folder() / "data"


def image_folder(name: str) -> Path | None:
    """The folder of images that a name stands for: ImageNet's, or a path; None if it reads as neither."""
    if name == IMAGENET:
        return data_folder() / IMAGENET
    path = Path(name).expanduser()
    return path if "/" in name or os.sep in name or path.is_dir() else None


def find_file(file: DataFile) -> Path:
    """Where a file lies: in the data folder or, if it is not there, in the cache. It need not exist."""
    places = [data_folder() / file.path, cache_folder() / "data" / file.path]
    return next((place for place in places if place.exists()), places[0])


def read_data(data: DataSet, name: str) -> bytes:
    """The content of one file of a data set, checked. A packed one comes unpacked.

    Args:
        data: the data set.
        name: of the file, without its folder.

    Raises:
        DataError: the file is missing, damaged or cannot be read.
    """
    file = next(file for file in data.files if file.path.rpartition("/")[2] == name)
    path = find_file(file)
    try:
        return checked(path, file)
    except FileNotFoundError:
        raise DataError(f"{file.path} is missing: {_where_from(data)}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {_where_from(data)}") from None


def checked(path: Path, file: DataFile) -> bytes:
    """The content of `path`, which should be `file`; a packed one comes unpacked.

    Raises:
        DataError: it is another file.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if file.packed:
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise DataError(f"{path} is damaged: its gzip cannot be unpacked; {_again()}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise DataError(
            f"{path} is damaged: expected {file.size:,} bytes of sha256 {file.sha256[:12]}…, "
            f"got {len(content):,} of {found[:12]}…; {_again()}"
        )
    return content


def _again() -> str:
    return "copy or get it again"


def _where_from(data: DataSet) -> str:
    named = os.environ.get(FOLDER_VARIABLE)
    if named and not Path(named).is_dir():
        return f"{FOLDER_VARIABLE} names {named}, which is not a folder"
    folder = f"copy it to {named}" if named else f"set {FOLDER_VARIABLE} to the folder that holds it"
    return f"`trimtab data get {data.name}` fetches it, or {folder}" if data.can_be_fetched else folder
