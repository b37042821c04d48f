import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trimtab.errors import RunFolderError
from trimtab.report.tail import HeadRow, Tail
from trimtab.report.terminal import Frame, duration, follow, show, watch_command

ADVICE = "Lower the learning rate, warm it up, or convert the model. " * 4


def tail_of(num_alarms: int = 5, num_heads: int = 12) -> Tail:
    """A run of three lines, the last 3 s ago at the time 103."""
    sigma = {f"encoder.layers.{i}.weight": [float(i), 0.5] for i in range(8)} | {"lost.weight": [math.nan]}
    line = {
        "step": 1200,
        "loss": 2.345678,
        "lr": [1e-3, 1e-4],
        "grad_norm": 0.5,
        "entropy_min": 0.01,
        "entropy_mean": 3.21,
        "max_logit": 1234.5,
        "sigma": sigma,
        "gamma": {"encoder.layers.7.weight": [1.25, 0.5]},
    }
    curves = {name: [3.0, 2.0, 1.0] for name in ("loss", "lr", "grad_norm", "entropy_min", "entropy_mean", "max_logit")}
    heads = [
        HeadRow(f"a.module.with.quite.a.long.name.{i}.attention head 0", 0.5, 0.9 - i / 20, 10.0)
        for i in range(num_heads)
    ]
    heads += [HeadRow("unseen head 0", math.nan, math.nan, math.nan)] if heads else []
    alarms = [{"message": f"step {i}: entropy collapse. {ADVICE}"} for i in range(num_alarms)]
    info = {"recipe": {"steps": 4000}}
    return Tail(Path("runs/x"), info, line, curves, [0.0, 1.0, 2.0], alarms, heads, {}, written=100.0)


def text(tail: Tail, width: int = 80, height: int = 24, now: float = 103.0, **options: Any) -> str:
    whole = options.pop("whole", False)
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None, **options)
    console.print(Frame(tail, now, whole))
    written = console.file
    assert isinstance(written, io.StringIO)
    return written.getvalue()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 50), (120, 24), (120, 40), (200, 60)])
@pytest.mark.parametrize("num_alarms", [0, 1, 5])
@pytest.mark.parametrize("num_heads", [0, 12])
def test_a_frame_fits_its_screen(width: int, height: int, num_alarms: int, num_heads: int) -> None:
    """One line is left for the cursor; more would make the live view flicker or lose its end."""
    lines = text(tail_of(num_alarms, num_heads), width, height).splitlines()
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    assert "loss" in lines[2]


def test_it_says_what_there_is_to_know() -> None:
    shown = text(tail_of(), 120, 60)
    for part in ("runs/x", "step 1,200 of 4,000", "last line 3 s ago", "2.346", "0.001", "3.21", "1234", "█▅▁"):
        assert part in shown, part
    (heads,) = [number for number, line in enumerate(shown.splitlines()) if "lowest entropy, 12 heads" in line]
    first, second = shown.splitlines()[heads + 1 : heads + 3]
    assert first.split()[1:] == ["head", "0", "0.35", "0.5", "10", "lost.weight", "nan"]  # NaN is the worst sigma
    assert second.split()[1:] == ["head", "0", "0.4", "0.5", "10", "encoder.layers.7.weight", "7", "1.25"]
    assert "unseen" not in shown
    assert "5 alarms, the latest first" in shown
    assert shown.index("step 4: entropy collapse") < shown.index("step 3: entropy collapse")
    assert shown.count("Lower the learning rate") == 12  # three alarms, each to its end


def test_a_long_name_keeps_its_end() -> None:
    assert "...th.quite.a.long.name.11.attention head 0 " in text(tail_of(), 70)


@pytest.mark.parametrize(
    ("now", "times", "said"),
    [
        (103.0, [0.0, 1.0, 2.0], "last line 3 s ago"),
        (140.0, [0.0, 1.0, 2.0], "no new line for 40 s"),
        (140.0, [0.0, 30.0, 60.0], "last line 40 s ago"),  # it takes its time
        (90.0, [0.0, 1.0, 2.0], "last line 0 s ago"),  # another machine's clock
        (7300.0, [0.0, 1.0, 2.0], "no new line for 2.0 h"),
    ],
)
def test_a_run_that_stands_still_is_told_from_a_slow_one(now: float, times: list[float], said: str) -> None:
    tail = tail_of()
    tail.times = times
    assert said in text(tail, now=now)


def test_the_end_is_told() -> None:
    tail = tail_of()
    tail.result = {"status": "diverged"}
    assert "step 1,200 of 4,000, diverged" in text(tail, now=900.0)


def test_a_terminal_without_unicode_gets_ascii() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=file, width=80, force_terminal=True, color_system=None).print(Frame(tail_of(), 103.0))
    file.flush()  # would raise for what is not ASCII
    assert isinstance(file.buffer, io.BytesIO)
    assert b"#=_" in file.buffer.getvalue()


def test_before_the_first_line_it_waits() -> None:
    assert "there is no run yet. Waiting; Ctrl-C leaves." in text(Tail(Path("runs/x")))
    assert "no step is logged yet" in text(Tail(Path("runs/x"), info={"started": "now"}))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (40, "40 s"), (119, "119 s"), (180, "3 min"), (7199, "120 min"), (9000, "2.5 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def log(folder: Path, step: int, **entries: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text('{"started": "now"}')
    with open(folder / "steps.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step, **entries}) + "\n")


def terminal() -> Console:
    return Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)


def test_it_follows_a_run_from_before_its_start_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, console = Path("run"), terminal()
    events = [
        lambda: None,
        lambda: log(folder, 1),
        lambda: log(folder, 20),
        lambda: (folder / "result.json").write_text('{"status": "finished"}'),
    ]

    def sleep(seconds: float) -> None:
        events.pop(0)()

    follow(folder, console, sleep)
    assert not events
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    order = ["there is no run yet", "step 1,", "step 20,", "step 20, finished"]
    assert [shown.index(part) for part in order] == sorted(shown.index(part) for part in order)


def test_ctrl_c_leaves_quietly(tmp_path: Path) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    log(tmp_path / "run", 1)
    follow(tmp_path / "run", terminal(), interrupted)


def test_the_command_prints_once_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(tmp_path / "run", 7, alarms=[{"message": "look here"}])
    assert watch_command([str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "step 7" in out
    assert "look here" in out
    assert "\x1b" not in out
    assert watch_command([str(tmp_path / "run"), "--once"]) == 0
    assert capsys.readouterr().out == out


def test_nothing_to_print_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds no run \(no run.json\)"):
        watch_command([str(tmp_path / "run"), "--once"])
    log(tmp_path / "run", 1)
    (tmp_path / "run" / "steps.jsonl").unlink()
    with pytest.raises(RunFolderError, match="has no logged step yet"):
        show(tmp_path / "run", terminal())
