import io
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trimtab.train.progress import Progress
from trimtab.train.screen import RunScreen, figures
from trimtab.train.screen import console as terminal
from trimtab.train.signals import Interruption

ALARMS = tuple(f"step {i}: entropy collapse: head {i}. " + "What to do next. " * 10 for i in range(1, 6))


def console(width: int = 80, height: int = 24, terminal: bool = True, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    return Console(
        file=file, width=width, height=height, force_terminal=terminal, color_system=None, legacy_windows=False
    )


def written(console: Console) -> str:
    console.file.flush()
    file: Any = console.file
    return str(file.buffer.getvalue().decode(file.encoding))


def progress(step: int, **changes: Any) -> Progress:
    now = Progress(step, 200, 1 / step, 1e-3, {}, 1 / step, "blocks.0.attention head 1", (), step / 10, 3000.4)
    return replace(now, **changes)


def frame(screen: RunScreen, **options: Any) -> list[str]:
    """One picture, as it stands on the screen."""
    shown = console(**options)
    shown.print(screen)
    return written(shown).splitlines()


def after(*steps: Progress, seconds: float | None = None, folder: str = "runs/vit-digits") -> RunScreen:
    screen = RunScreen(Path(folder), console(), seconds)
    for step in steps:
        screen.show(step)
    return screen


def row(lines: list[str], label: str) -> str:
    (line,) = [line for line in lines if line.startswith(label)]
    return line[len(label) :].strip()


def test_a_frame_shows_what_matters() -> None:
    scores = {"accuracy": 0.5, "eval_loss": 1.25}
    better = {"accuracy": 0.9753, "eval_loss": 161670.1289}
    lines = frame(after(progress(20, metrics=scores), progress(40, metrics=better, alarms=ALARMS)))
    assert lines[0].split() == ["runs/vit-digits", "step", "40", "of", "200,", "16", "s", "left"]
    assert lines[1].startswith("━━━━━━")
    assert row(lines, "loss").split() == ["0.025", "█▁"]
    assert row(lines, "accuracy").split() == ["0.9753", "▁█"]
    assert row(lines, "eval_loss").split() == ["1.617e+05", "▁█"]
    assert row(lines, "lowest entropy, of 1").split(maxsplit=2) == ["0.025", "█▁", "blocks.0.attention head 1"]
    assert row(lines, "learning rate") == "0.001"
    assert row(lines, "samples/s") == "3,000"
    assert "5 alarms, the latest first" in lines
    text = " ".join(lines)
    assert " ".join(ALARMS[-1].split()) in " ".join(text.split())  # the latest in full
    assert [line[:6] for line in lines[-2:]] == ["step 4", "step 3"]  # of two more the beginning


def test_a_metric_has_a_point_for_each_evaluation_only() -> None:
    first, second = {"accuracy": 0.5}, {"accuracy": 0.6}
    steps = [progress(20 * i, metrics=first if i < 5 else second) for i in range(1, 9)]
    assert len(row(frame(after(*steps)), "accuracy").split()[1]) == 2
    assert len(row(frame(after(*steps)), "loss").split()[1]) == 8


def test_before_the_first_step_and_without_attention() -> None:
    assert frame(after())[0].split() == ["runs/vit-digits", "getting", "ready"]
    lines = frame(after(progress(20, entropy_min=None, worst_head=None, loss=float("nan"))))
    assert row(lines, "loss").split() == ["nan", "!"]
    assert not [line for line in lines if "entropy" in line]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_it_fits_its_terminal(width: int, encoding: str) -> None:
    steps = [progress(i, metrics={"accuracy": i / 300}, alarms=ALARMS) for i in range(1, 200)]
    screen = after(*steps, folder="runs/" + "a-long-name" * 20)
    lines = frame(screen, width=width, encoding=encoding)
    assert max(map(len, lines)) <= width
    assert row(lines, "accuracy").startswith("0.6633 ")
    assert row(lines, "lowest entropy, of 1").endswith("head 1")
    assert "step 199 of 200, 0 s left" in lines[0]
    assert lines[0].startswith("...")
    if encoding == "cp1252":
        assert "?" not in "".join(lines)


def test_a_long_run_costs_no_more_to_draw() -> None:
    screen = after(*(progress(i, metrics={"accuracy": i / 9e4}) for i in range(1, 2000)))
    assert max(map(len, screen._curves.values())) <= 200


@pytest.mark.parametrize(
    ("steps", "limit", "left"),
    [
        ([], None, ""),
        ([20], None, "step 20 of 200"),  # of the first step, which is a slow one, no pace is taken
        ([20, 40], None, "step 40 of 200, 16 s left"),
        ([20, 40], 10.0, "step 40 of 200, 6 s left"),
        ([20], 10.0, "step 20 of 200, 8 s left"),
        ([20, 200], None, "step 200 of 200, 0 s left"),
    ],
)
def test_the_time_left(steps: list[int], limit: float | None, left: str) -> None:
    assert frame(after(*map(progress, steps), seconds=limit))[0].rstrip().endswith(left)


def test_the_pace_is_that_of_this_process() -> None:
    """A run that goes on: the seconds before are of another, perhaps slower, process."""
    lines = frame(after(progress(120, seconds=1000.0), progress(140, seconds=1002.0)))
    assert lines[0].endswith("step 140 of 200, 6 s left")


def test_ctrl_c_is_acknowledged_while_the_step_ends() -> None:
    screen = after(progress(20), progress(40))
    with Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        assert frame(screen)[0].endswith("step 40 of 200, stopping after this step")
    assert frame(screen)[0].endswith("16 s left")


def test_warnings_stand_above_the_table() -> None:
    shown = console()
    with RunScreen(Path("runs/x"), shown) as screen:
        screen.show(progress(20))
        print("a line on stderr", file=sys.stderr)
        logging.lastResort.handle(logging.makeLogRecord({"msg": "a damaged file", "levelno": 30}))  # type: ignore[union-attr]
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written(shown))
    for part in ("a line on stderr", "a damaged file"):
        assert 0 <= text.index(part) < text.rindex("samples/s"), part


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_pipe_is_never_drawn_on(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "1")
    with RunScreen(Path("runs/x"), terminal()) as screen:
        screen.show(progress(20))
    assert capsys.readouterr().out == "step 20/200  loss 0.0500  lr 0.001  lowest entropy 0.050  3,000 samples/s\n"


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = console()
    with RunScreen(Path("runs/x"), shown) as screen:
        screen.show(progress(20))
    assert written(shown).startswith("step 20/200  loss")


@pytest.mark.parametrize("gone", [True, False])
def test_a_reader_that_has_seen_enough_does_not_end_the_run(gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        shown = terminal()
        screen = RunScreen(Path("runs/x"), shown)
        screen.show(progress(20))
        seen = os.read(reader, 1000)
        if gone:
            os.close(reader)
        for step in (40, 60, 80):
            screen.show(progress(step))
        shown.print("the end")
        stream.flush()
        if not gone:
            seen += os.read(reader, 1000)
            os.close(reader)
    assert seen.count(b"step ") == (1 if gone else 4)


@pytest.mark.parametrize(
    ("value", "text"), [(0.97531, "0.9753"), (-2.0, "-2.0000"), (161670.1, "1.617e+05"), (float("nan"), "nan")]
)
def test_figures(value: float, text: str) -> None:
    assert figures(value) == text


def test_a_run_in_a_terminal_stopped_by_ctrl_c(tmp_path: Path) -> None:
    """The whole of it once: a process in a pseudo-terminal, the live table, Ctrl-C, a checkpoint."""
    words = ["train", "vit-digits", "--steps", "100000", "--watch-every", "1", "--eval-every", "100000"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "LINES": "24", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "trimtab", *words]
    outside, inside = pty.openpty()
    with subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, cwd=tmp_path, env=environment, start_new_session=True
    ) as process:
        os.close(inside)
        seen = _read_until(outside, "samples/s")
        process.send_signal(signal.SIGINT)
        seen += _read_until(outside, None)
        os.close(outside)
    assert process.returncode == 130
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
    assert "\x1b[3" not in seen  # no colour
    assert "lowest entropy, of 1" in text
    stopped = re.search(r"stopped; saved at step ([\d,]+)\. The same command goes on: trimtab (.*)", text)
    assert stopped is not None
    assert stopped[2].split() == words
    checkpoints = tmp_path / "runs/vit-digits/checkpoints"
    assert (checkpoints / f"step-{int(stopped[1].replace(',', '')):08d}").is_dir()


def _read_until(terminal: int, word: str | None) -> str:
    """What a terminal shows until a word is there, or until its end."""
    seen, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline and (word is None or word.encode() not in seen):
        if select.select([terminal], [], [], 1)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            seen += data
    return seen.decode(errors="replace")
