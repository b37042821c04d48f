import gzip
from pathlib import Path

import pytest

from trimtab.errors import DataError
from trimtab.tasks.language.texts import find_texts

LINES = [f"line {number} of the text\n" for number in range(200)]


def written(folder: Path, **contents: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        path = folder / f"{name}.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_cut_at_ends_of_lines_after_90_and_95_percent(tmp_path: Path, packed: bool) -> None:
    content = "".join(LINES).encode()
    path = tmp_path / "book.txt"
    path.write_bytes(gzip.compress(content) if packed else content)
    texts = find_texts(str(path))
    parts = [list(part) for part in (texts.train, texts.validation, texts.test)]
    assert [line for part in parts for line in part] == LINES
    sizes = [len("".join(part)) for part in parts]
    assert 0.9 * len(content) < sizes[0] <= 0.9 * len(content) + 30
    assert 0.95 * len(content) < sizes[0] + sizes[1] <= 0.95 * len(content) + 30
    assert texts.name == "book"


def test_a_text_can_be_read_again_and_ends_with_a_newline(tmp_path: Path) -> None:
    folder = written(tmp_path, train="one\r\n\n two", valid="ü", test="")
    texts = find_texts(str(folder))
    assert list(texts.train) == list(texts.train) == ["one\n", "\n", " two\n"]
    assert list(texts.validation) == ["ü\n"]
    assert list(texts.test) == []


@pytest.mark.parametrize(
    "names", [("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"), ("a_train.raw", "dev.txt", "b-TEST")]
)
def test_a_folder_has_a_file_for_each_part(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "README.md").write_text("about trains and tests")
    (tmp_path / ".train.txt.swp").write_text("")
    texts = find_texts(str(tmp_path))
    assert [list(part) for part in (texts.train, texts.validation, texts.test)] == [[f"{name}\n"] for name in names]


def test_wikitext_103_is_a_folder_of_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match="wikitext-103 is missing: put wikitext-103's files there"):
        find_texts("wikitext-103")
    written(tmp_path / "wikitext-103", train="a", valid="b")
    texts = find_texts("wikitext-103")
    assert (texts.name, texts.test, list(texts.train)) == ("wikitext-103", None, ["a\n"])


def test_another_content_has_another_checksum(tmp_path: Path) -> None:
    first = find_texts(str(written(tmp_path, train="a", valid="b"))).checksum
    second = find_texts(str(written(tmp_path, train="a", valid="c"))).checksum
    assert first != second


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no text 'tinyshakespear'\. Did you mean tinyshakespeare\?"):
        find_texts("tinyshakespear")
    with pytest.raises(DataError, match=r"needs one file for train, .* such as train.txt; it has none"):
        find_texts(str(written(tmp_path / "empty")))
    with pytest.raises(DataError, match=r"needs one file for validation, .*; it has dev.txt, valid.txt"):
        find_texts(str(written(tmp_path / "twice", train="a", valid="b", dev="c")))
    with pytest.raises(DataError, match=r"nothing\.txt is empty"):
        find_texts(str(written(tmp_path / "files", nothing="") / "nothing.txt"))
    for name, content in (("one_line", "a" * 1000), ("short", "a\nb\n")):
        folder = written(tmp_path / "files", **{name: content})
        with pytest.raises(DataError, match=r"in too few lines to be cut at the ends of lines"):
            find_texts(str(folder / f"{name}.txt"))


def test_what_is_no_utf8_is_told_by_its_line(tmp_path: Path) -> None:
    folder = written(tmp_path, train=b"good\n\xfcber\n", valid=b"a")
    with pytest.raises(DataError, match=r"line 2 of .*train.txt is no UTF-8 text: convert the file to UTF-8"):
        list(find_texts(str(folder)).train)
    late = tmp_path / "late.txt"
    late.write_bytes("".join(LINES).encode() + b"\xff\n")
    with pytest.raises(DataError, match=r"line \d+ of .*late.txt, counted from byte [\d,]+, is no UTF-8"):
        list(find_texts(str(late)).test)


def test_a_gzip_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress("".join(LINES).encode())
    (tmp_path / "book.txt.gz").write_bytes(packed[:-20])
    with pytest.raises(DataError, match=r"book.txt.gz is damaged: its gzip cannot be unpacked"):
        find_texts(str(tmp_path / "book.txt.gz"))
    written(tmp_path / "parts", valid="a")
    (tmp_path / "parts" / "train.txt.gz").write_bytes(packed[:-20])
    with pytest.raises(DataError, match=r"train.txt.gz is damaged"):
        list(find_texts(str(tmp_path / "parts")).train)


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_text("schön\n" * 30, encoding="utf-8-sig")
    texts = find_texts(str(tmp_path / "marked.txt"))
    assert set(texts.train) | set(texts.validation) == {"schön\n"}
