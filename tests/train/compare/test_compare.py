"""A compare as a person meets it: run, broken, killed, extended and run again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from trimtab.errors import DataError, RecipeError, RunFolderError
from trimtab.stabilizers import Stabilizer, register
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Examples, Task
from trimtab.train.compare.grid import RunPlace, plan
from trimtab.train.compare.running import Failure, _look, compare, finished, run_places
from trimtab.train.hardware import Hardware
from trimtab.train.progress import Progress, Result

CPU = Hardware(accelerator="cpu")

pytestmark = pytest.mark.usefixtures("fork_server")


@register("test-small-start")
@dataclass(frozen=True)
class SmallStart(Stabilizer):
    """A stabilizer of one's own: weights start a tenth as large."""

    def apply_(self, model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.1)


@dataclass(frozen=True, kw_only=True)
class Line(Recipe):
    """Fits a line; misbehaves at some learning rates if it is told to.

    Attributes:
        trace: folder in which every run notes the indices of its batches, and waits while there is a file "hold".
        raises_at: learning rate at which the loss raises.
        killed_at: learning rate at which the process is killed in the fifth step, if the trace has no file "spared".
        pause: seconds in each batch.
        ballast: bytes held in memory.
        missing: what is said of the data, which are missing then.
    """

    trace: str = ""
    raises_at: float = 0.0
    killed_at: float = 0.0
    pause: float = 0.0
    ballast: int = 0
    missing: str = ""
    steps: int = 8
    batch_size: int = 4
    watch: bool = False
    watch_every: int = 2
    eval_every: int = 4
    checkpoint_every: int = 2

    def task(self) -> Task:
        if self.missing:
            raise DataError(self.missing)
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        y = x.sum(dim=1, keepdim=True)
        note = Path(self.trace) / f"{self.stabilizer} {self.lr:g} {self.seed}"
        batches = 0

        def batch(indices: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
            nonlocal batches
            batches += 1
            time.sleep(self.pause)
            if self.trace and len(indices) == self.batch_size:
                with note.open("a") as file:
                    file.write(f"{indices.tolist()}\n")
                while (Path(self.trace) / "hold").exists():
                    time.sleep(0.01)
            if self.lr == self.killed_at and batches == 5 and not (Path(self.trace) / "spared").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return x[indices], y[indices]

        ballast = bytearray(self.ballast)

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            if self.lr == self.raises_at and not (Path(self.trace) / "spared").exists():
                raise ZeroDivisionError("the loss is broken")
            assert len(ballast) == self.ballast
            return F.mse_loss(model(batch[0]), batch[1])

        def score(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            return {"eval_loss": (model(batch[0]) - batch[1]).square().mean(dim=1)}

        def whole(indices: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
            return x[indices], y[indices]

        return Task(nn.Linear(3, 1), Examples(16, batch), loss, Examples(16, whole), score=score)


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(max(folder.glob("checkpoints/step-*")) / "model.safetensors")


def stamp(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and last change of every file of a run."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_only_runs_that_fail_are_lost_and_only_they_run_again(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.mkdir()
    base = Line(trace=str(trace), raises_at=0.5, killed_at=0.25)
    arms = {"none": base, "own start": replace(base, stabilizer="test-small-start")}
    heard: dict[str, list[Any]] = {}

    def hear(name: str, news: Any) -> None:
        heard.setdefault(name, []).append(news)

    folder = tmp_path / "compare"
    grid = ([0.1, 0.25, 0.5], [0, 1])
    places = compare(arms, *grid, folder, jobs=2, on_news=hear, hardware=CPU, facts={"recipe_name": "line"})
    assert places == plan(arms, *grid, folder)
    assert set(heard) == {place.name for place in places}
    for place in places:
        end = heard[place.name][-1]
        error = place.folder / "error.json"
        if place.recipe.lr == 0.1:
            assert isinstance(end, Result)
            assert end == finished(place)
            assert end.status == "finished"
            assert end.metrics["eval_loss"] < end.initial["eval_loss"]
            assert [news.step for news in heard[place.name][:-1]] == [1, 2, 4, 6, 8]
            assert not error.exists()
            info = json.loads((place.folder / "run.json").read_text())
            assert (info["arm"], info["recipe_name"], info["seed"]) == (place.arm, "line", place.recipe.seed)
        else:
            assert isinstance(end, Failure)
            assert not (place.folder / "result.json").exists()
            content = json.loads(error.read_text())
            assert (content["kind"], content["error"]) == (end.kind, end.error)
            assert (content["arm"], content["lr"]) == (place.arm, place.recipe.lr)
            expected = {0.25: ("WorkerDied", "SIGKILL"), 0.5: ("ZeroDivisionError", "the loss is broken")}
            kind, words = expected[place.recipe.lr]
            assert end.kind == kind
            assert words in end.error
    # seed by seed the same weights' start, but for the stabilizer, and the same examples in the same order
    for seed in (0, 1):
        plain, own = ((trace / f"{name} 0.1 {seed}").read_text() for name in ("none", "test-small-start"))
        assert plain == own
        assert len(plain.splitlines()) == base.steps
    assert (trace / "none 0.1 0").read_text() != (trace / "none 0.1 1").read_text()

    kept = {place.name: stamp(place.folder) for place in places if place.recipe.lr == 0.1}
    (trace / "spared").touch()
    heard.clear()
    more = compare(arms, [0.1, 0.25, 0.5], [0, 1, 2], folder, jobs=2, on_news=hear, hardware=CPU)
    for place in more:
        assert isinstance(heard[place.name][-1], Result), heard[place.name]
        assert not (place.folder / "error.json").exists()
        if place.name in kept:
            assert stamp(place.folder) == kept[place.name]
            assert len(heard[place.name]) == 1
    last = _look((more[0], (), CPU, {}))
    assert (last.step, last.steps, last.lr, last.loss) == (8, 8, 0.1, log(more[0].folder)[-1]["loss"])
    continued = [place for place in more if place.recipe.lr == 0.25 and place.recipe.seed == 0]
    for place in continued:  # from the checkpoint of the last even step before the kill
        steps = [news.step for news in heard[place.name] if isinstance(news, Progress)]
        assert steps == [6, 8]
        assert [line["step"] for line in log(place.folder)] == [1, 2, 4, 6, 8]


def test_a_folder_takes_one_compare_and_what_extends_it(tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    base = Line(steps=2)
    arms = {"a": base, "b": replace(base, clip=1.0)}
    compare(arms, [0.1], [0], folder, jobs=1, hardware=CPU)
    before = (folder / "compare.json").read_text()
    assert json.loads(before)["arms"]["b"]["clip"] == 1.0

    def refused(message: str, arms: dict[str, Line], folder: Path = folder) -> None:
        with pytest.raises(RunFolderError, match=message):
            compare(arms, [0.1], [0], folder, jobs=1, hardware=CPU)
        assert (tmp_path / "compare" / "compare.json").read_text() == before

    refused("arm 'b', which this one lacks; name all its arms", {"a": base})
    refused("clip of the arm 'b' is 1.0 there and 2.0 here", {"a": base, "b": replace(base, clip=2.0)})
    refused("steps of the arm 'a' is 2 there and 3 here", {**arms, "a": replace(base, steps=3)})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    refused("is not empty and holds no compare", arms, tmp_path / "thesis")
    refused("is a file", arms, tmp_path / "thesis" / "thesis.tex")
    (folder / "compare.json").write_text("[")
    before = "["
    refused("compare.json is damaged", arms)
    assert not list(tmp_path.rglob("*.part"))
    shutil.rmtree(folder / "runs")  # as of a compare that found no Ray cluster, say: nothing is lost
    compare({"c": base}, np.array([0.1]), np.arange(1), folder, jobs=1, hardware=CPU)
    content = json.loads((folder / "compare.json").read_text())
    assert (list(content["arms"]), content["lrs"], content["seeds"]) == (["c"], [0.1], [0])


def test_a_run_folder_that_cannot_be_used_is_left_alone_and_the_rest_goes_on(tmp_path: Path) -> None:
    base = Line(steps=2)
    arms = {"a": base, "b": replace(base, clip=1.0), "c": replace(base, clip=2.0)}
    places = compare({"a": base}, [0.1], [0], tmp_path, jobs=1, hardware=CPU)
    another = tmp_path / "runs" / "b" / places[0].folder.name
    shutil.copytree(places[0].folder, another)  # the run of arm a: another recipe
    (tmp_path / "runs" / "c").write_text("no folder")
    before = stamp(another)
    heard: dict[str, Any] = {}
    compare(arms, [0.1], [0], tmp_path, jobs=1, hardware=CPU, on_news=lambda *news: heard.update([news]))
    a, b, c = (heard[f"{arm} lr0.1 seed0"] for arm in arms)
    assert isinstance(a, Result)
    assert b.kind == "RunFolderError"
    assert "clip is None there and 1.0 here" in b.error
    assert stamp(another) == before
    assert isinstance(c, Failure)
    assert (tmp_path / "runs" / "c").read_text() == "no folder"


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(RecipeError, match="at least one arm"):
        compare({}, [0.1], [0], folder)
    with pytest.raises(RecipeError, match="did you mean sigma"):
        compare({"a": Line(stabilizer="sgima")}, [0.1], [0], folder)
    with pytest.raises(RecipeError, match="jobs must be at least 1"):
        compare({"a": Line()}, [0.1], [0], folder, jobs=0)

    class Hidden(Line):
        """Another process cannot find it."""

    with pytest.raises(RecipeError, match="Hidden cannot be sent to another process"):
        compare({"a": Hidden()}, [0.1], [0], folder)
    gone = Line(missing="the lines are gone")
    with pytest.raises(DataError, match="the lines are gone"):
        compare({"a": gone, "b": replace(gone, clip=1.0)}, [0.1, 0.2], [0, 1], folder)
    with pytest.raises(RecipeError, match="batch_size 20 is larger than the 16 training examples"):
        compare({"a": Line(batch_size=20)}, [0.1], [0], folder)
    with pytest.raises(RecipeError, match="strategy 'ddp' shares the work of several processes"):
        compare({"a": Line()}, [0.1], [0], folder, hardware=Hardware("cpu", "ddp"))
    with pytest.raises(DataError, match="the lines are gone"):
        run_places(plan({"a": gone}, [0.1], [0], folder))
    with pytest.raises(RecipeError, match="jobs must be at least 1"):
        run_places(plan({"a": Line()}, [0.1], [0], folder), jobs=0)
    assert not folder.exists()


def test_data_that_one_arm_alone_lacks_stop_no_other(tmp_path: Path) -> None:
    arms = {"gone": Line(missing="the lines are gone"), "late": Line(missing="not yet there"), "there": Line(steps=2)}
    heard: dict[str, Any] = {}
    state = torch.get_rng_state()
    compare(arms, [0.1], [0], tmp_path, jobs=1, hardware=CPU, on_news=lambda *news: heard.update([news]))
    assert [heard[f"{arm} lr0.1 seed0"].kind for arm in ("gone", "late")] == ["DataError"] * 2
    assert heard["there lr0.1 seed0"].status == "finished"
    assert torch.equal(torch.get_rng_state(), state)  # looking at the data first leaves no trace


def test_what_is_finished_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {"a": Line(steps=2)}
    compare(arms, [0.1], [0], tmp_path, jobs=1, hardware=CPU)

    def gone(recipe: Line) -> Task:
        raise DataError("the lines are gone")

    monkeypatch.setattr(Line, "task", gone)
    heard: list[Any] = []
    compare(arms, [0.1], [0], tmp_path, jobs=1, hardware=CPU, on_news=lambda _, news: heard.append(news))
    assert [news.status for news in heard] == ["finished"]
    with pytest.raises(DataError, match="the lines are gone"):
        compare(arms, [0.1], [0, 1], tmp_path, jobs=1, hardware=CPU)


def test_a_budget_in_seconds_ends_runs_for_good(tmp_path: Path) -> None:
    arms = {"a": Line(steps=10**9, seconds=0.2), "b": Line(steps=10**9, seconds=0.2, clip=1.0)}
    heard: list[Any] = []
    for _ in range(2):
        compare(arms, [0.1], [0], tmp_path, jobs=2, hardware=CPU, on_news=lambda name, news: heard.append(news))
    ends = [news for news in heard if isinstance(news, Result)]
    assert [end.status for end in ends] == ["out of time"] * 4
    assert {end.folder: end for end in ends[:2]} == {end.folder: end for end in ends[2:]}
    assert ends[2:] == heard[-2:]  # the second time they are read, not trained


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a peak")
@pytest.mark.slow
def test_the_peak_memory_of_a_run_is_its_own(tmp_path: Path) -> None:
    heard: dict[str, Any] = {}
    size = 300_000_000
    arms = {"heavy": Line(steps=2, ballast=size), "light": Line(steps=2)}
    compare(arms, [0.1], [0], tmp_path / "c", jobs=1, hardware=CPU, on_news=lambda *news: heard.update([news]))
    heavy, light = (heard[f"{arm} lr0.1 seed0"].peak_memory_bytes for arm in arms)
    assert heavy - light > 0.9 * size


SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("lines", {path!r})
sys.modules["lines"] = lines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lines)
if __name__ == "__main__":
    try:
        lines.small_grid(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit(130)
"""


def small_grid(folder: str | Path, pause: float = 0.05) -> list[RunPlace]:
    base = Line(pause=pause)
    arms = {"none": base, "own": replace(base, stabilizer="test-small-start")}
    return compare(arms, [0.1, 0.2], [0, 1], folder, jobs=2, hardware=CPU)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small grid, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    small_grid(folder)
    return folder


def none_left(session: int) -> bool:
    """Whether all processes of a session end, within a while."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(session_of(int(entry.name)) == session for entry in Path("/proc").glob("[0-9]*")):
            return True
        time.sleep(0.05)
    return False


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_grid_stopped_at_any_moment_goes_on_to_the_same_end(
    tmp_path: Path, whole: Path, number: signal.Signals
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(path=__file__))
    folder = tmp_path / "stopped"
    process = subprocess.Popen([sys.executable, script, folder], start_new_session=True)
    deadline = time.monotonic() + 300
    while not list(folder.glob("runs/*/*/result.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.Random(0).uniform(0.0, 0.3))
    process.send_signal(number)
    assert process.wait(300) == (130 if number == signal.SIGINT else -number)
    assert none_left(process.pid)
    done = {path.parent: stamp(path.parent) for path in folder.glob("runs/*/*/result.json")}
    assert done
    places = small_grid(folder)
    assert {run: stamp(run) for run in done} == done
    assert len(places) == 8
    for place in places:
        other = whole / place.folder.relative_to(folder)
        assert finished(place)
        assert log(place.folder) == log(other)
        torch.testing.assert_close(weights(place.folder), weights(other), rtol=0, atol=0)
