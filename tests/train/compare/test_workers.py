"""Worker processes: what they do, what they survive, and what is left of them."""

import importlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.train.compare.parcels import pack, unpack
from trimtab.train.compare.workers import run_all, visible_gpus

pytestmark = pytest.mark.usefixtures("fork_server")


@dataclass(frozen=True)
class Told:
    """A class that another process cannot import by name."""

    pid: int
    threads: int
    variable: str
    gpu: str | None


def work(task: str, tell: Callable[[Any], None]) -> Told:
    if task == "raises":
        raise KeyError("no such thing")
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.startswith("logs"):
        logging.getLogger("trimtab").warning("100 % of it")
    tell(f"{task} goes on")
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Told(os.getpid(), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], gpu)


def test_workers_are_reused_and_lose_only_what_fails(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[str, Any]] = []
    tasks = {name: name for name in ("a", "raises", "killed", "logs", "logs too", "b", "c")}
    before = dict(os.environ)
    outcomes = run_all(
        work,
        tasks,
        jobs=2,
        threads=3,
        gpus=["7"],
        tell=lambda name, news: heard.append((name, news)),
        lost=lambda task, kind, error: (task, kind, error),
    )
    assert dict(os.environ) == before
    assert set(outcomes) == set(tasks)
    assert outcomes["raises"] == ("raises", "KeyError", "'no such thing'")
    assert outcomes["killed"][:2] == ("killed", "WorkerDied")
    assert "SIGKILL" in outcomes["killed"][2]
    whole = [outcome for name, outcome in outcomes.items() if name not in ("raises", "killed")]
    assert {(each.threads, each.variable, each.gpu) for each in whole} == {(3, "3", "7")}
    assert len({each.pid for each in whole}) <= 3  # two workers, one of which was replaced
    for name in ("a", "logs", "b", "c"):
        mine = [news for told, news in heard if told == name]
        assert mine == [f"{name} goes on", outcomes[name]]
    assert caplog.messages == ["100 % of it"]


def test_what_cannot_be_pickled_is_refused_before_a_worker_starts() -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    with pytest.raises((AttributeError, TypeError), match=r"pickle|local"):
        run_all(work, {"a": lambda: 0}, jobs=1, tell=never, lost=never)


def test_a_class_of_a_file_travels_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside.py").write_text("SIZE = 3\n")
    (tmp_path / "far_away.py").write_text("import beside\nclass Box:\n    size = beside.SIZE\n")

    def forget() -> None:
        for name in ("far_away", "beside"):
            sys.modules.pop(name, None)

    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        parcel = pack(importlib.import_module("far_away").Box())
    forget()
    path = list(sys.path)
    try:
        assert unpack(parcel).size == 3
        assert sys.path == path
        forget()
        (tmp_path / "far_away.py").write_text("import nothing_of_this_name")
        with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
            unpack(parcel)
        assert "far_away" not in sys.modules
    finally:
        forget()
    assert unpack(pack((1, "a"))) == (1, "a")


def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a7, 9")  # the third does not answer
    assert visible_gpus() == ["4", "GPU-a7"]


STOPPABLE = """
    import os, signal, sys, time
    from pathlib import Path
    from trimtab.train.compare.workers import run_all

    def work(task, tell):
        stopped = []
        before = signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        Path(task).write_text(str(os.getpid()))
        while not stopped:
            time.sleep(0.01)
        signal.signal(signal.SIGTERM, before)
        return "saved " + task

    if __name__ == "__main__":
        tell = lambda name, news: print(name, news, flush=True)
        try:
            run_all(work, {name: name for name in sys.argv[1:]}, jobs=2, tell=tell, lost=lambda *_: "lost")
        except KeyboardInterrupt:
            print("interrupted")
"""


def start_stoppable(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Two workers at work and a task that waits; the main process and the workers' ids."""
    (folder / "script.py").write_text(textwrap.dedent(STOPPABLE))
    process = subprocess.Popen(
        [sys.executable, "script.py", "a", "b", "c"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if all((folder / name).is_file() and (folder / name).read_text() for name in "ab"):
            return process, [int((folder / name).read_text()) for name in "ab"]
        time.sleep(0.05)
    raise AssertionError(process.communicate()[0])


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_no_worker_is_left_and_their_last_words_are_heard(tmp_path: Path, number: signal.Signals) -> None:
    process, workers = start_stoppable(tmp_path)
    if number == signal.SIGKILL:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)  # as a terminal does, and `timeout`
    out, _ = process.communicate(timeout=300)
    assert all_gone(workers)
    assert not (tmp_path / "c").exists()
    if number == signal.SIGKILL:
        assert out == ""
    else:
        said = "stopping: the runs under way save first; Ctrl-C again ends them at once"
        assert sorted(out.splitlines()) == ["a saved a", "b saved b", "interrupted", said]


@pytest.mark.slow
def test_workers_that_never_start_are_an_error(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        textwrap.dedent("""
        import os
        if __name__ != "__main__":
            os._exit(7)
        from trimtab.train.compare.workers import run_all
        try:
            run_all(print, {"a": 1}, jobs=1, tell=print, lost=print)
        except RuntimeError as error:
            print(error)
        """)
    )
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120).stdout
    assert out.startswith("no worker process starts: its process ended by itself, with exit code 7.")
