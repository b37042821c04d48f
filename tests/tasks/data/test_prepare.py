import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from trimtab.tasks.data import prepare, prepared
from trimtab.tasks.data.prepare import Arrays

IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


class Made:
    """Makes the arrays and counts how often."""

    def __init__(self, seconds: float = 0) -> None:
        self.times, self.seconds = 0, seconds

    def __call__(self) -> Arrays:
        self.times += 1
        time.sleep(self.seconds)
        return {"images": IMAGES, "labels": np.array([1, 0])}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "trimtab" / "prepared"


def assert_right(arrays: Arrays) -> None:
    assert sorted(arrays) == ["images", "labels"]
    assert arrays["images"].dtype == np.uint8
    assert np.array_equal(arrays["images"], IMAGES)
    assert np.array_equal(arrays["labels"], [1, 0])


def only(folder: Path) -> Path:
    (found,) = [path for path in folder.iterdir() if path.is_dir()]
    return found


def test_made_once_then_mapped(folder: Path) -> None:
    make = Made()
    for _ in range(3):
        arrays = prepared("toy", ["sum"], make)
        assert_right(arrays)
        assert isinstance(arrays["images"], np.memmap)
    assert make.times == 1
    assert only(folder).name.startswith("toy-")


def test_other_sources_are_other_data() -> None:
    prepared("toy", ["sum"], Made())
    make = Made()
    assert_right(prepared("toy", ["other sum"], make))
    assert make.times == 1


def test_a_write_stays_in_this_process() -> None:
    torch.from_numpy(prepared("toy", ["sum"], Made())["images"]).zero_()
    assert_right(prepared("toy", ["sum"], Made()))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


@pytest.mark.parametrize("name", ["images.npy", "index.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damaged_data_are_made_anew(
    folder: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    prepared("toy", ["sum"], Made())
    damage(only(folder) / name)
    make = Made()
    assert_right(prepared("toy", ["sum"], make))
    assert make.times == 1
    again = Made()
    assert_right(prepared("toy", ["sum"], again))
    assert again.times == 0
    if damage is not Path.unlink:
        assert "is damaged" in caplog.text


def test_many_at_the_same_time_make_it_once() -> None:
    make = Made(seconds=0.1)
    with ThreadPoolExecutor(8) as pool:
        for arrays in pool.map(lambda _: prepared("toy", ["sum"], make), range(8)):
            assert_right(arrays)
    assert make.times == 1


SLOW = """
import time
import numpy as np
from trimtab.tasks.data import prepare

def save(file, array, **_):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)

prepare.np.save = save
prepare.prepared("toy", ["sum"], lambda: {"images": np.zeros(1), "labels": np.zeros(1)})
"""


def test_a_process_killed_while_it_writes_is_in_nobodys_way(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, env=os.environ.copy())
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert_right(prepared("toy", ["sum"], Made()))
    assert only(folder)  # the half of the killed process is gone


def test_a_cache_that_cannot_be_made_leaves_the_data_in_memory_with_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.write_text("a file where the cache should be")
    for _ in range(2):
        assert_right(prepared("toy", ["sum"], Made()))
    assert caplog.text.count("the data stay in memory") == 1


def test_a_full_disk_leaves_the_data_in_memory_and_no_half_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.os, "fsync", full)
    make = Made()
    assert_right(prepared("toy", ["sum"], make))
    assert make.times == 1
    assert "No space left on device" in caplog.text
    assert [path for path in folder.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), NotImplementedError("no flock here")])
def test_a_cache_that_cannot_be_locked_is_read_all_the_same(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prepared("toy", ["sum"], Made())

    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    make = Made()
    assert_right(prepared("toy", ["sum"], make))
    assert make.times == 0
    assert_right(prepared("other", ["sum"], make))  # which is not there and cannot be written
    assert make.times == 1
    assert str(error.args[-1]) in caplog.text


def test_who_is_out_of_patience_makes_them_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared("toy", ["sum"], Made())
    (lock,) = folder.glob("toy-*.lock")
    shutil.rmtree(lock.with_suffix(""))
    make = Made()
    with FileLock(lock):  # of a process that is at it
        assert_right(prepared("toy", ["sum"], make, patience=0.1))
    assert make.times == 1
    assert [path for path in folder.iterdir() if path.is_dir()] == []
    assert "the data stay in memory" in caplog.text


def test_an_error_of_the_maker_is_its_own(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Arrays:
        raise OSError("of the source")

    caplog.set_level(logging.WARNING)
    with pytest.raises(OSError, match="of the source"):
        prepared("toy", ["sum"], fail)
    assert caplog.text == ""
    shutil.rmtree(folder)
    assert_right(prepared("toy", ["sum"], Made()))
