import gzip
from pathlib import Path

import pytest

from trimtab.errors import DataError
from trimtab.tasks.text.lines import lines_of, read_text


def test_lines_end_at_newlines_only() -> None:
    assert lines_of("a\nb\n") == lines_of("a\nb") == lines_of("a\r\nb\r\n") == ["a", "b"]
    assert lines_of("a\u2028b\x85c\n\nd\n") == ["a\u2028b\x85c", "", "d"]
    assert lines_of("") == []


def test_packed_and_plain_files_read_alike(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("schön\nund gut\n", encoding="utf-8")
    (tmp_path / "packed").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    assert read_text(tmp_path / "plain") == read_text(tmp_path / "packed") == "schön\nund gut\n"


def test_what_is_no_text_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere cannot be read \(No such file"):
        read_text(tmp_path / "nowhere")
    (tmp_path / "latin").write_bytes("gut\nschön\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"line 2 of .*latin is no UTF-8 text"):
        read_text(tmp_path / "latin")
    (tmp_path / "torn").write_bytes(gzip.compress(b"long" * 100)[:20])
    with pytest.raises(DataError, match="torn is damaged: its gzip cannot be unpacked"):
        read_text(tmp_path / "torn")


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "marked").write_text("schön\n", encoding="utf-8-sig")
    assert read_text(tmp_path / "marked") == "schön\n"
