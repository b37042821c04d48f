"""Writing a page."""

from pathlib import Path

import pytest

from trimtab.report.page import write_html


def test_an_older_page_stays_whole_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_html(tmp_path / "a.html", "old")

    def full(path: Path, *args: object, **options: object) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_html(tmp_path / "a.html", "new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.html", "old")]
