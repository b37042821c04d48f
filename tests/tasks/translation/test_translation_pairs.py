"""Pairs of sentences by name, from folders and from two files; what does not fit together is told."""

import gzip
import os
import random
from pathlib import Path

import pytest
from translation_corpus import sentences, write_folder

from trimtab.errors import DataError
from trimtab.tasks.translation.pairs import PARTS, Pairs, divided, find_corpus

real = pytest.mark.skipif(not os.environ.get("TRIMTAB_DATA"), reason="TRIMTAB_DATA is not set")


@real
def test_multi30k_has_its_parts() -> None:
    parts = find_corpus("multi30k", "de", "en").read()
    assert [len(parts[part].source) for part in PARTS] == [29_000, 1014, 1000]
    assert parts["train"].source[0].startswith("Zwei junge weiße Männer")
    assert parts["train"].target[0].startswith("Two young, White males")
    newer = find_corpus("multi30k", "en", "de", "test_2017_flickr").read()
    assert newer["test"].source != parts["test"].target
    assert newer["train"] == Pairs(parts["train"].target, parts["train"].source)


@real
def test_tatoeba_has_no_english_sentence_in_two_parts() -> None:
    parts = find_corpus("tatoeba-deu-eng", "de", "en").read()
    english = {part: set(pairs.target) for part, pairs in parts.items()}
    assert sum(len(pairs.source) for pairs in parts.values()) == 169_197
    assert not english["train"] & english["test"]
    assert not english["train"] & english["valid"]
    assert not english["valid"] & english["test"]
    assert min(len(pairs.source) for pairs in parts.values()) > 1000


def test_the_sentence_alone_decides_its_part() -> None:
    draw = random.Random(0)
    names = [f"sentence {draw.randrange(900)}" for _ in range(2000)]  # many of them more than once
    parts = divided(Pairs(names, list(map(str, range(2000)))), names)
    assert sorted(int(row) for pairs in parts.values() for row in pairs.target) == list(range(2000))
    part_of = {name: part for part, pairs in parts.items() for name in pairs.source}
    assert sum(len(set(pairs.source)) for pairs in parts.values()) == len(set(names))  # each in one part
    draw.shuffle(names)
    again = divided(Pairs(names, names), names)
    assert {name: part for part, pairs in again.items() for name in pairs.source} == part_of


def test_a_folder_packed_or_not(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "own")
    plain = find_corpus(str(folder), "en", "de").read()
    assert plain["valid"] == Pairs(*sentences(12, 1))
    for path in folder.iterdir():
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert find_corpus(str(folder), "en", "de").read() == plain
    assert find_corpus(str(folder), "de", "en").read()["test"] == Pairs(plain["test"].target, plain["test"].source)


def test_a_folder_of_the_data_folder_and_another_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "own-en-de")
    for language in ("en", "de"):
        (folder / f"newstest.{language}").write_text("a\r\nb", encoding="utf-8")
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    corpus = find_corpus("own-en-de", "en", "de", "newstest")
    assert corpus.name == "own-en-de"
    assert corpus.read()["test"] == Pairs(["a", "b"], ["a", "b"])


def test_two_files_are_divided_by_source_sentence(tmp_path: Path) -> None:
    lines = [f"sentence {number}" for number in range(1000)]
    (tmp_path / "mine.en").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "mine.de").write_text("\n".join(lines), encoding="utf-8")
    corpus = find_corpus(f"{tmp_path}/mine.en,{tmp_path}/mine.de", "en", "de")
    assert corpus.read() == divided(Pairs(lines, lines), lines)
    checksums = corpus.checksums
    (tmp_path / "mine.de").write_text("\n".join(lines[::-1]), encoding="utf-8")
    assert find_corpus(f"{tmp_path}/mine.en,{tmp_path}/mine.de", "en", "de").checksums != checksums


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("multi30k", "en", "fr"), "multi30k has English and German: source and target must be en and de, got en, fr"),
        (("multi30k", "en", "en"), "source and target must be two languages, got 'en' for both"),
        (("multi30k", "en", "de", "test_2018"), "has the tests test_2016_flickr, test_2017_flickr; got 'test_2018'"),
        (("tatoeba-deu-eng", "en", "de", "x"), "tatoeba-deu-eng holds out a test of its own"),
        (
            ("nowhere", "en", "fr"),
            r"there is no 'nowhere'\. Expected .* a folder, here or in .*, of train\.en, train\.fr",
        ),
        (("multi3k", "en", "de"), r"there is no 'multi3k'\. Did you mean multi30k\?"),
        (("a,b,c", "en", "de"), "expected two files, SOURCE,TARGET; got 3"),
        (("no.en,no.de", "en", "de"), r"no.en cannot be read \(No such file or directory\)"),
    ],
)
def test_what_is_not_there_is_told(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        find_corpus(*arguments)


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "own")
    (folder / "valid.de").write_text("eins\nzwei\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"valid\.en has 12 lines and .*valid\.de has 2: line n of one"):
        find_corpus(str(folder), "en", "de").read()
    (folder / "valid.de").unlink()
    with pytest.raises(DataError, match=r"valid\.de is missing, packed \(\.gz\) or not"):
        find_corpus(str(folder), "en", "de")
    (folder / "valid.de").write_text("", encoding="utf-8")
    (folder / "valid.en").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="are empty"):
        find_corpus(str(folder), "en", "de").read()
    (folder / "valid.en").write_bytes(b"good\n\xff\n")
    with pytest.raises(DataError, match=r"line 2 of .*valid\.en is no UTF-8 text"):
        find_corpus(str(folder), "en", "de").read()
    (tmp_path / "few.en").write_text("a\nb", encoding="utf-8")
    (tmp_path / "few.de").write_text("a\nb", encoding="utf-8")
    with pytest.raises(DataError, match="2 pairs are too few to hold out one in 100"):
        find_corpus(f"{tmp_path}/few.en,{tmp_path}/few.de", "en", "de").read()
    (tmp_path / "few.en").write_text("a\n" * 300, encoding="utf-8")
    (tmp_path / "few.de").write_text("a\n" * 300, encoding="utf-8")
    with pytest.raises(DataError, match="300 pairs of 1 different sentences are too few to hold out one in 100"):
        find_corpus(f"{tmp_path}/few.en,{tmp_path}/few.de", "en", "de").read()
    with pytest.raises(DataError, match=r"few\.en is one file, and a translation needs two of as many lines"):
        find_corpus(f"{tmp_path}/few.en", "en", "de")
