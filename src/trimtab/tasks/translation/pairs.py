"""Pairs of sentences: data sets by name, folders and pairs of text files, in parts to train, validate and test on."""

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trimtab.errors import DataError
from trimtab.tasks.data import DATA_SETS, data_folder, read_data
from trimtab.tasks.text.lines import decode_text, lines_of, read_text
from trimtab.words import nearest

MULTI30K, TATOEBA = "multi30k", "tatoeba-deu-eng"
PARTS = ("train", "valid", "test")
_SHARES = 100  # of the sentences, one each is for validation and test


class Pairs(NamedTuple):
    """Sentences and their translations: line n of one belongs to line n of the other."""

    source: list[str]
    target: list[str]


@dataclass(frozen=True)
class Corpus:
    """Pairs of sentences in three parts, not yet read.

    Attributes:
        name: for people.
        checksums: what decides the sentences.
        read: makes the parts, by the names of `PARTS`.
    """

    name: str
    checksums: tuple[str, ...]
    read: Callable[[], dict[str, Pairs]]


def find_corpus(data: str, source: str, target: str, test: str | None = None) -> Corpus:
    """Find pairs of sentences.

    Args:
        data: "multi30k"; "tatoeba-deu-eng"; a folder, by its path or by its name in `TRIMTAB_DATA`, that holds
            ``train.de``, ``valid.de``, ``test.de`` and the same of the other language, packed (``train.de.gz``) or not;
            or two text files, "SOURCE,TARGET", of which line n of one is the translation of line n of the other.
        source: the language that is translated from, such as "de"; the end of its files' names.
        target: the language that is translated to.
        test: name of the test files without the language; None for "test_2016_flickr" of multi30k, "test" of a folder.

    Raises:
        DataError: there is no such data, language or test.
    """
    if source == target:
        raise DataError(f"source and target must be two languages, got {source!r} for both")
    if data in (MULTI30K, TATOEBA):
        if {source, target} != {"en", "de"}:
            raise DataError(
                f"{data} has English and German: source and target must be en and de, got {source}, {target}"
            )
        return _multi30k(source, target, test) if data == MULTI30K else _tatoeba(source, test)
    if "," in data:
        return _two_files(data, test)
    return _folder(data, source, target, test or "test")


def _multi30k(source: str, target: str, test: str | None) -> Corpus:
    files = {file.path.rpartition("/")[2]: file.sha256 for file in DATA_SETS[MULTI30K].files}
    tests = sorted({name.partition(".")[0] for name in files if name.startswith("test")})
    test = test or "test_2016_flickr"
    if test not in tests:
        raise DataError(f"multi30k has the tests {', '.join(tests)}; got {test!r}")
    names = {
        part: (f"{stem}.{source}.gz", f"{stem}.{target}.gz")
        for part, stem in zip(PARTS, ("train", "val", test), strict=True)
    }

    def read() -> dict[str, Pairs]:
        def lines(name: str) -> list[str]:
            return lines_of(read_text_of(read_data(DATA_SETS[MULTI30K], name), name))

        return {part: _paired(lines(one), lines(other), one, other) for part, (one, other) in names.items()}

    return Corpus(MULTI30K, tuple(files[name] for pair in names.values() for name in pair), read)


def read_text_of(content: bytes, name: str) -> str:
    """The text of a file of a data set, which may be one that its owners have packed."""
    return decode_text(zlib.decompress(content, wbits=31) if content[:2] == b"\x1f\x8b" else content, name)


def _tatoeba(source: str, test: str | None) -> Corpus:
    _refuse_test(test, TATOEBA)
    file = DATA_SETS[TATOEBA].files[0]

    def read() -> dict[str, Pairs]:
        name = file.path.rpartition("/")[2]
        rows = [line.split("\t") for line in lines_of(read_text_of(read_data(DATA_SETS[TATOEBA], name), name))]
        english, german = [row[0] for row in rows], [row[1] for row in rows]
        pairs = Pairs(english, german) if source == "en" else Pairs(german, english)
        return divided(pairs, english)

    return Corpus(TATOEBA, (file.sha256, "by English sentence"), read)


def _two_files(data: str, test: str | None) -> Corpus:
    _refuse_test(test, "a pair of files")
    paths = [Path(part.strip()).expanduser() for part in data.split(",")]
    if len(paths) != 2:
        raise DataError(f"expected two files, SOURCE,TARGET; got {len(paths)}: {data}")

    def read() -> dict[str, Pairs]:
        one, other = (lines_of(read_text(path)) for path in paths)
        return divided(_paired(one, other, *map(str, paths)), one)

    return Corpus(paths[0].stem, (*map(_checksum, paths), "by source sentence"), read)


def _folder(data: str, source: str, target: str, test: str) -> Corpus:
    folder = Path(data).expanduser()
    if folder.is_file():
        raise DataError(f"{data} is one file, and a translation needs two of as many lines: {data},ITS-TRANSLATION")
    if not folder.is_dir() and os.sep not in data:
        folder = data_folder() / data
    if not folder.is_dir():
        raise DataError(
            f"there is no {data!r}.{nearest(data, (MULTI30K, TATOEBA))} Expected {MULTI30K}, {TATOEBA}, two files "
            f"(SOURCE,TARGET), or a folder, here or in {data_folder()}, of train.{source}, train.{target}, "
            f"valid.{source} ..."
        )
    paths = {
        part: (_text_file(folder, f"{stem}.{source}"), _text_file(folder, f"{stem}.{target}"))
        for part, stem in zip(PARTS, ("train", "valid", test), strict=True)
    }

    def read() -> dict[str, Pairs]:
        return {
            part: _paired(lines_of(read_text(one)), lines_of(read_text(other)), str(one), str(other))
            for part, (one, other) in paths.items()
        }

    return Corpus(folder.name, tuple(_checksum(path) for pair in paths.values() for path in pair), read)


def _text_file(folder: Path, name: str) -> Path:
    found = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if found is None:
        raise DataError(
            f"{folder / name} is missing, packed (.gz) or not: a folder has train, valid and test of each language"
        )
    return found


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None


def _paired(one: list[str], other: list[str], name: str, other_name: str) -> Pairs:
    if len(one) != len(other):
        raise DataError(
            f"{name} has {len(one):,} lines and {other_name} has {len(other):,}: line n of one must be the translation "
            "of line n of the other"
        )
    if not one:
        raise DataError(f"{name} and {other_name} are empty")
    return Pairs(one, other)


def divided(pairs: Pairs, sentences: list[str]) -> dict[str, Pairs]:
    """Divide pairs into parts by a sentence of each, so that the same sentence is never in two parts.

    Its checksum (CRC-32) decides, whatever the order: one in a hundred is for validation, one for the test.

    Args:
        pairs: what to divide.
        sentences: what decides, one for each pair.

    Raises:
        DataError: a part would be empty.
    """
    rows: dict[str, list[int]] = {part: [] for part in PARTS}
    for row, sentence in enumerate(sentences):
        rows[{0: "test", 1: "valid"}.get(zlib.crc32(sentence.encode()) % _SHARES, "train")].append(row)
    empty = [part for part, chosen in rows.items() if not chosen]
    if empty:
        different = len(set(sentences))
        of = "" if different == len(sentences) else f" of {different:,} different sentences"
        raise DataError(
            f"{len(sentences):,} pairs{of} are too few to hold out one in {_SHARES} each for validation and test: "
            f"{empty[0]} is empty. Put train, valid and test into files of their own, in a folder"
        )
    return {
        part: Pairs([pairs.source[row] for row in chosen], [pairs.target[row] for row in chosen])
        for part, chosen in rows.items()
    }


def _refuse_test(test: str | None, name: str) -> None:
    if test is not None:
        raise DataError(f"{name} holds out a test of its own: leave test={test!r} out")


def counts(parts: Mapping[str, Pairs]) -> dict[str, int]:
    """How many pairs each part has."""
    return {part: len(pairs.source) for part, pairs in parts.items()}
