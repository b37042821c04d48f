import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trimtab.tasks.recipe import Recipe
from trimtab.train.compare import Failure
from trimtab.train.compare.grid import plan
from trimtab.train.compare.screen import GridScreen
from trimtab.train.progress import Progress, Result

ARMS = {"none": Recipe(), "sigma:gamma_init=one": Recipe()}
LRS = (1e-3, 1e-2, 3e-1)
SEEDS = (0, 1, 2)
FOLDER = Path("runs/compare-vit-digits")


def console(width: int = 80, terminal: bool = True, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    return Console(file=file, width=width, height=24, force_terminal=terminal, color_system=None, legacy_windows=False)


def written(console: Console) -> str:
    console.file.flush()
    file: Any = console.file
    return str(file.buffer.getvalue().decode(file.encoding))


def progress(step: int) -> Progress:
    return Progress(step, 200, 0.5, 1e-3, {"accuracy": 0.1}, None, None, (), 1.0, 100.0)


def result(accuracy: float, **changes: Any) -> Result:
    ended = Result(Path("x"), "finished", 200, 0.25, 12.0, 0.01, 3000.0, 1e5, 10**9, metric="accuracy")
    return replace(ended, metrics={"accuracy": accuracy}, **changes)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set what the time is."""
    now = [0.0]
    monkeypatch.setattr("trimtab.train.compare.screen.time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def screen_of(shown: Console | None = None, kept: Sequence[str] = ()) -> GridScreen:
    return GridScreen(plan(ARMS, LRS, SEEDS, FOLDER), FOLDER, shown or console(), kept)


def frame(screen: GridScreen, **options: Any) -> list[str]:
    shown = console(**options)
    shown.print(screen)
    return written(shown).splitlines()


def cells(lines: list[str], arm: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(arm)]
    return re.split(r"\s{2,}", line.strip())[1:]


def test_a_cell_tells_of_its_runs() -> None:
    screen = screen_of()
    assert cells(frame(screen), "none") == ["·", "·", "·"]
    screen.show("none lr0.001 seed0", progress(20))
    screen.show("none lr0.001 seed1", progress(100))
    assert cells(frame(screen), "none")[0] == "50%"
    screen.show("none lr0.001 seed1", result(0.8))
    assert cells(frame(screen), "none")[0] == "0.800 1/3"
    screen.show("none lr0.001 seed0", result(0.1, status="diverged"))
    assert cells(frame(screen), "none")[0] == "0.450 2/3 1x"  # a median; a diverged run counts
    screen.show("none lr0.001 seed2", result(0.9))
    assert cells(frame(screen), "none")[0] == "0.800 1x"
    screen.show("none lr0.01 seed0", Failure(Path("x"), "ValueError", "no"))
    screen.show("none lr0.01 seed1", result(0.5, status="interrupted"))
    assert cells(frame(screen), "none")[1] == "1!"
    screen.show("none lr0.3 seed0", replace(result(0.5), metrics={}, metric=None, loss=1e11))
    assert cells(frame(screen), "none")[2] == "1e+11 1/3"
    assert cells(frame(screen), "sigma:gamma_init=one") == ["·", "·", "·"]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_it_fits_its_terminal(width: int, encoding: str) -> None:
    screen = screen_of()
    for place in plan(ARMS, LRS, SEEDS, FOLDER):
        if place.recipe.seed < 2:
            screen.show(place.name, progress(20))
            screen.show(place.name, result(0.5, status="diverged"))
    screen.show("none lr0.3 seed2", Failure(Path("x"), "ValueError", "a long story " * 20))
    lines = frame(screen, width=width, encoding=encoding)
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("runs/compare-vit-digits ")
    assert "13 of 18 runs, about 0 s left" in lines[0]
    assert lines[1].split() == ["learning", "rate", "0.001", "0.01", "0.3"]
    assert cells(lines, "sigma:gamma_init=one") == ["0.500 x" if width == 60 else "0.500 2/3 2x"] * 3
    assert lines[-2].startswith("median accuracy of the runs that ended")
    assert lines[-1].startswith("failed: none lr0.3 seed2: a long story")
    assert "?" not in "".join(lines)


def test_the_time_left_is_that_of_the_runs_of_this_process(clock: Callable[[float], None]) -> None:
    kept = [place.name for place in plan(ARMS, LRS, SEEDS, FOLDER)[:8]]
    screen = screen_of(kept=kept)
    for name in kept:
        screen.show(name, result(0.5))  # it tells nothing of the pace
    names = [place.name for place in plan(ARMS, LRS, SEEDS, FOLDER)[8:]]
    clock(30.0)
    screen.show(names[0], progress(100))
    assert frame(screen)[0].endswith("8 of 18 runs")  # not before a run has ended
    clock(60.0)
    screen.show(names[0], result(0.5))
    screen.show(names[1], progress(20))
    screen.show(names[1], progress(100))
    # one run and a half in 60 s, eight and a half to come
    assert frame(screen)[0].endswith("9 of 18 runs, about 6 min left")
    assert screen.ended == [*kept, names[0]]


def test_plain_lines(clock: Callable[[float], None]) -> None:
    shown = console(terminal=False, width=40)
    with screen_of(shown, ["none lr0.001 seed0"]) as screen:
        screen.show("none lr0.001 seed0", result(0.5))
        screen.show("none lr0.01 seed0", progress(20))
        clock(10.0)
        screen.show("none lr0.01 seed0", result(0.75))
        screen.show("none lr0.3 seed0", Failure(Path("x"), "ValueError", "no such [thing]"))
        screen.show("none lr0.3 seed1", progress(20))
        screen.show("none lr0.3 seed1", result(0.0, status="interrupted", steps=40))
    assert written(shown).splitlines() == [
        "2/18  none lr0.01 seed0: finished, accuracy 0.750, 12 s  about 3 min left",
        "3/18  none lr0.3 seed0: failed: ValueError: no such [thing]  about 75 s left",
        "3/18  none lr0.3 seed1: stopped and saved at step 40  about 75 s left",
    ]
    assert list(screen.failures) == ["none lr0.3 seed0"]


def test_a_live_table_leaves_its_last_picture() -> None:
    shown = console()
    with screen_of(shown) as screen:
        screen.show("none lr0.01 seed0", progress(20))
        screen.show("none lr0.01 seed0", result(0.75))
    assert "0.750 1/3" in written(shown)
