"""What a data set is: its files, who publishes them and under which licence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataFile:
    """One file of a data set.

    Attributes:
        path: inside the data folder.
        size: in bytes.
        sha256: of the content.
        url: where its owners publish it; None if it comes from a folder only.
        packed: the file is a gzip of what `size`, `sha256` and `url` are of. Owners publish some sets unpacked, and no
            two gzips need write the same bytes.
    """

    path: str
    size: int
    sha256: str
    url: str | None = None
    packed: bool = False


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        name: what it is called everywhere.
        task: what it is for.
        contents: how much of what it holds.
        licence: as its owners state it.
        source: who publishes it.
        files: all of them.
    """

    name: str
    task: str
    contents: str
    licence: str
    source: str
    files: tuple[DataFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def can_be_fetched(self) -> bool:
        """Whether every file has an address."""
        return all(file.url for file in self.files)
