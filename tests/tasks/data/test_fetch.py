import contextlib
import errno
import gzip
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from trimtab.errors import DataError
from trimtab.tasks.data import fetch as fetch_module
from trimtab.tasks.data.data_set import DataFile
from trimtab.tasks.data.fetch import ATTEMPTS, fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@dataclass
class Server:
    """What a local server does, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    etag: str | None = '"first"'
    ranges: bool = True
    shift: int = 0  # how far the part that is sent lies from the part that is asked for
    answers: list[int] = field(default_factory=list)  # statuses to answer with first
    cuts: list[int] = field(default_factory=list)  # bytes after which the connection ends, answer by answer
    asked: list[tuple[str | None, str | None]] = field(default_factory=list)  # Range, If-Range

    def file(self, content: bytes = CONTENT, *, packed: bool = False) -> DataFile:
        path = "set/file.gz" if packed else "set/file.bin"
        return DataFile(path, len(content), hashlib.sha256(content).hexdigest(), self.url, packed)


@pytest.fixture
def server() -> Iterator[Server]:
    does = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted, condition = self.headers["Range"], self.headers["If-Range"]
            does.asked.append((wanted, condition))
            if does.answers:
                self.send_response(does.answers.pop(0))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            total, start = len(does.content), 0
            if does.ranges and wanted and condition in (None, does.etag):
                found = re.fullmatch(r"bytes=(\d+)-", wanted)
                assert found
                start = int(found[1]) + does.shift
                does.shift = 0
                if start >= total:
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(total - start))
            if does.etag:
                self.send_header("ETag", does.etag)
            self.end_headers()
            body = does.content[start:]
            with contextlib.suppress(ConnectionError):  # the client may go first
                self.wfile.write(body[: does.cuts.pop(0)] if does.cuts else body)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    does.url = f"http://127.0.0.1:{http.server_port}/file"
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield does
    http.shutdown()
    http.server_close()
    thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "set").iterdir())


def test_a_file_comes_whole_and_is_not_fetched_twice(server: Server, tmp_path: Path) -> None:
    seen: list[int] = []
    path = fetch(server.file(), tmp_path, seen.append)
    assert path == tmp_path / "set" / "file.bin"
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["file.bin"]
    assert seen == sorted(seen)
    assert seen[-1] == len(CONTENT)
    assert fetch(server.file(), tmp_path) == path
    assert len(server.asked) == 1


def test_a_damaged_file_is_fetched_again(server: Server, tmp_path: Path) -> None:
    path = fetch(server.file(), tmp_path)
    path.write_bytes(CONTENT[:-1])
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT


def test_a_connection_that_ends_early_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.cuts = [1000, 5000]
    assert fetch(server.file(), tmp_path, wait=0).read_bytes() == CONTENT
    assert server.asked == [(None, None), ("bytes=1000-", '"first"'), ("bytes=6000-", '"first"')]


def test_always_truncated(server: Server, tmp_path: Path) -> None:
    server.cuts = [100] * ATTEMPTS
    message = rf"the connection ended early; {100 * ATTEMPTS} of 1,048,576 bytes are here after {ATTEMPTS} attempts"
    with pytest.raises(DataError, match=message):
        fetch(server.file(), tmp_path, wait=0)
    assert not (tmp_path / "set" / "file.bin").exists()
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT  # the next call goes on
    assert server.asked[-1] == (f"bytes={100 * ATTEMPTS}-", '"first"')


def test_interrupted_and_resumed(server: Server, tmp_path: Path) -> None:
    def ctrl_c(here: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server.file(), tmp_path, ctrl_c)
    here = (tmp_path / "set" / "file.bin.part").stat().st_size
    assert 0 < here < len(CONTENT)
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.asked[1] == (f"bytes={here}-", '"first"')
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_resumed_without_a_mark_of_the_version(server: Server, tmp_path: Path, etag: str | None) -> None:
    server.etag, server.cuts = etag, [1000]
    assert fetch(server.file(), tmp_path, wait=0).read_bytes() == CONTENT
    assert server.asked[1] == ("bytes=1000-", None)


def test_a_server_without_ranges_sends_the_whole_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [1000]
    assert fetch(server.file(), tmp_path, wait=0).read_bytes() == CONTENT
    assert server.asked == [(None, None), ("bytes=1000-", '"first"')]


def test_a_file_that_changed_in_between_starts_anew(server: Server, tmp_path: Path) -> None:
    old, server.content = server.content, CONTENT[::-1]
    server.cuts = [1000] * ATTEMPTS
    with pytest.raises(DataError, match="ended early"):
        fetch(server.file(), tmp_path, wait=0)
    server.content, server.etag = old, '"second"'
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT


def test_the_wrong_content_is_removed_and_both_checksums_are_told(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[::-1]
    expected, got = (hashlib.sha256(content).hexdigest() for content in (CONTENT, CONTENT[::-1]))
    with pytest.raises(DataError, match=f"sha256 {expected} of 1,048,576 bytes; got {got} of 1,048,576"):
        fetch(server.file(), tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [CONTENT + b"x", CONTENT[:-1], b"<html>please log in</html>"])
def test_the_wrong_length_is_told_at_once(server: Server, tmp_path: Path, content: bytes) -> None:
    server.content = content
    with pytest.raises(DataError, match=f"it has {len(content):,} bytes instead of 1,048,576"):
        fetch(server.file(), tmp_path)
    assert len(server.asked) == 1
    assert names(tmp_path) == []


def test_a_part_of_something_longer_starts_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file.bin.part").write_bytes(CONTENT + b"more")
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.asked == [(None, None)]


def test_a_part_longer_than_the_servers_file_is_dropped(server: Server, tmp_path: Path) -> None:
    server.content, file = CONTENT[:500], server.file()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(DataError, match="it has 500 bytes instead of 1,048,576"):
        fetch(file, tmp_path, wait=0)
    assert server.asked == [("bytes=1000-", None), (None, None)]
    assert names(tmp_path) == []


def test_a_part_that_was_not_asked_for_is_not_taken(server: Server, tmp_path: Path) -> None:
    server.cuts, server.shift = [1000], 1
    assert fetch(server.file(), tmp_path, wait=0).read_bytes() == CONTENT
    assert [wanted for wanted, _ in server.asked] == [None, "bytes=1000-", None]


@pytest.mark.parametrize("status", [404, 403])
def test_a_file_that_is_not_there_is_told_at_once(server: Server, tmp_path: Path, status: int) -> None:
    server.answers = [status]
    with pytest.raises(DataError, match=rf"{server.url}: the server answered {status} .* Copy it to .*file.bin "):
        fetch(server.file(), tmp_path)
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.answers = [503, 429]
    assert fetch(server.file(), tmp_path, wait=0).read_bytes() == CONTENT
    assert len(server.asked) == 3


def test_no_network(server: Server, tmp_path: Path) -> None:
    file = replace(server.file(), url="http://127.0.0.1:1/file")  # where nobody listens
    with pytest.raises(DataError, match=rf"no connection \(.*refused.*\); 0 of .* after {ATTEMPTS} attempts"):
        fetch(file, tmp_path, wait=0)


def test_a_disk_without_room_is_told_before_anything_comes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(fetch_module.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(DataError, match=r"the disk of .* is full; free some space and get set/file.bin again"):
        fetch(server.file(), tmp_path)
    assert server.asked == []


def test_a_disk_that_fills_up_keeps_the_part(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(here: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DataError, match="is full"):
        fetch(server.file(), tmp_path, full)
    assert (tmp_path / "set" / "file.bin.part").stat().st_size > 0


def test_a_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set").write_text("a file")
    with pytest.raises(DataError, match=r"set/file.bin cannot be written"):
        fetch(server.file(), tmp_path)


def test_a_packed_file_is_checked_unpacked_and_kept_packed(server: Server, tmp_path: Path) -> None:
    file = server.file(packed=True)
    path = fetch(file, tmp_path)
    assert gzip.decompress(path.read_bytes()) == CONTENT
    assert names(tmp_path) == ["file.gz"]
    fetch(file, tmp_path)
    assert len(server.asked) == 1
    path.write_bytes(path.read_bytes()[:100])
    assert gzip.decompress(fetch(file, tmp_path).read_bytes()) == CONTENT
