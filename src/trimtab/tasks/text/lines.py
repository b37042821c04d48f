"""The lines of text files, plain or packed by gzip."""

import gzip
import zlib
from pathlib import Path

from trimtab.errors import DataError


def read_text(path: str | Path) -> str:
    """All of a file of UTF-8 text; one that is packed by gzip comes unpacked.

    Raises:
        DataError: the file is missing, cannot be read, or is no such text: the line is told.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: its gzip cannot be unpacked ({error})") from None
    return decode_text(content, str(path))


def decode_text(content: bytes, name: str) -> str:
    """Bytes as UTF-8 text; a mark of the byte order before it is no part of it.

    Raises:
        DataError: they are no such text: the line is told.
    """
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"line {line} of {name} is no UTF-8 text: convert the file to UTF-8") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text, cut at newlines only (a line may hold other separators), with or without one at the end."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
