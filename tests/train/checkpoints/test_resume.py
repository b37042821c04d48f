"""A run that was killed and goes on by the same call ends as one that never was, to the last bit."""

import importlib.util
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trimtab.errors import RunFolderError
from trimtab.tasks.recipe import Recipe
from trimtab.train import Progress, Result, train
from trimtab.train.checkpoints import files as checkpoint_files

STEPS = 18


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    """benchmarks/kill_resume.py: the recipe, processes to kill, and what must be the same."""
    path = Path(__file__).parents[3] / "benchmarks" / "kill_resume.py"
    spec = importlib.util.spec_from_file_location("kill_resume", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look up their module by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that are killed: other numbers of threads may add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(harness: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """The folder of a run of a recipe that nothing interrupts; one for each recipe."""
    done: dict[Recipe, Path] = {}

    def run(recipe: Recipe) -> Path:
        if recipe not in done:
            done[recipe] = tmp_path_factory.mktemp("whole") / "run"
            assert quiet(recipe, done[recipe]).status in ("finished", "stopped early")
        return done[recipe]

    return run


def quiet(recipe: Recipe, folder: Path) -> Result:
    return train(recipe, folder, lambda progress: None)


class Killed(BaseException):
    """Goes through everything, as a kill does."""


def killed_at(recipe: Recipe, folder: Path, step: int) -> None:
    def on_step(progress: Progress) -> None:
        if progress.step >= step:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, folder, on_step)


def variants(harness: ModuleType) -> dict[str, Recipe]:
    full = harness.recipe(STEPS)
    return {
        "all of it": full,
        "two optimisers": replace(full, optimizer="muon", ema=None, schedule="constant", stabilizer="none"),
        "no watch, best kept": replace(
            full, watch=False, patience=2, optimizer="sgd", eval_every=3, checkpoint_every=4
        ),
    }


@pytest.mark.parametrize(
    "name", ["all of it", *(pytest.param(n, marks=pytest.mark.slow) for n in ("two optimisers", "no watch, best kept"))]
)
def test_a_run_that_breaks_off_at_several_steps(
    harness: ModuleType, uninterrupted: Callable[[Recipe], Path], tmp_path: Path, name: str
) -> None:
    recipe = variants(harness)[name]
    reference = uninterrupted(recipe)
    for step in (1, 9):
        killed_at(recipe, tmp_path / "run", step)
    result = quiet(recipe, tmp_path / "run")
    assert harness.differences(tmp_path / "run", reference) == []
    inode = (tmp_path / "run" / "result.json").stat().st_ino
    assert quiet(recipe, tmp_path / "run") == result  # a finished run is not trained again
    assert (tmp_path / "run" / "result.json").stat().st_ino == inode


@pytest.mark.parametrize("at", ["sync", *(pytest.param(at, marks=pytest.mark.slow) for at in ("save_file", "remove"))])
def test_a_run_that_breaks_off_inside_the_write_of_a_checkpoint(
    harness: ModuleType,
    uninterrupted: Callable[[Recipe], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    """At each stage of it; what a real kill leaves behind is left here too, as nothing tidies up."""
    recipe = harness.recipe(STEPS)
    good, saves = getattr(checkpoint_files, at), []
    write = checkpoint_files.write_checkpoint

    def counted(path: Path, *arguments: Any) -> None:
        saves.append(path)
        write(path, *arguments)

    def killed(*arguments: Any) -> Any:
        if len(saves) == 2:
            raise Killed
        return good(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("trimtab.train.checkpoints.checkpoint.write_checkpoint", counted)
        patched.setattr("trimtab.train.checkpoints.files.shutil.rmtree", lambda *_, **__: None)
        for module in ("files", "checkpoint", "kept"):
            patched.setattr(f"trimtab.train.checkpoints.{module}.{at}", killed, raising=False)
        with pytest.raises(Killed):
            quiet(recipe, tmp_path / "run")
    quiet(recipe, tmp_path / "run")
    assert harness.differences(tmp_path / "run", uninterrupted(recipe)) == []
    assert not list(tmp_path.glob("run/checkpoints/*.part"))


def test_a_process_that_is_killed_at_once_and_inside_a_write(
    harness: ModuleType, uninterrupted: Callable[[Recipe], Path], tmp_path: Path
) -> None:
    draw, folder = random.Random(1), tmp_path / "run"
    assert harness.kill_once(folder, "1 process", STEPS, draw, inside=True) == "inside the write of step-00000010"
    assert (folder / "checkpoints" / "step-00000010.part").is_dir()
    assert harness.newest(folder) == 5
    assert harness.kill_once(folder, "1 process", STEPS, draw, inside=False) is not None
    quiet(harness.recipe(STEPS), folder)
    assert harness.differences(folder, uninterrupted(harness.recipe(STEPS))) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ["2 processes, DDP", "2 processes, FSDP2"])
def test_two_processes_that_are_killed(harness: ModuleType, tmp_path: Path, case: str) -> None:
    rows = harness.kills(tmp_path, case, count=3, steps=STEPS, seed=1)
    assert [row["differs"] for row in rows] == [[], [], []]
    assert "inside the write" in rows[1]["killed"]


def test_a_damaged_checkpoint_costs_a_few_steps_and_no_bit(
    harness: ModuleType, uninterrupted: Callable[[Recipe], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, folder = harness.recipe(STEPS), tmp_path / "run"
    killed_at(recipe, folder, 12)
    then = checkpoint_files.read_content(folder / "checkpoints" / "step-00000005")
    newest = folder / "checkpoints" / "step-00000010" / "optimizer.safetensors"
    os.truncate(newest, newest.stat().st_size - 3)
    result = quiet(recipe, folder)
    (record,) = caplog.records
    assert "step-00000010 is damaged: optimizer.safetensors" in record.message
    assert "Going on from step-00000005" in record.message
    assert harness.differences(folder, uninterrupted(recipe)) == []
    # Times go on where they were.
    times = [json.loads(line)["time"] for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert result.seconds > then["facts"]["seconds"] > 0
    assert times[-1] > then["watch"]["time"] > times[0]


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    harness: ModuleType,
    uninterrupted: Callable[[Recipe], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe, folder = harness.recipe(STEPS), tmp_path / "run"
    good = checkpoint_files.save_file

    def full(tensors: Any, path: Path, *arguments: Any) -> None:
        if "step-00000010" in str(path):
            raise OSError(28, "No space left on device")
        good(tensors, path, *arguments)

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    quiet(recipe, folder)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "No space left on device" in record.message
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert kept == ["step-00000005", "step-00000015", "step-00000018"][-recipe.keep :]
    assert harness.differences(folder, uninterrupted(recipe)) == []


def test_the_folder_of_another_run_is_left_as_it_was(
    harness: ModuleType, uninterrupted: Callable[[Recipe], Path], tmp_path: Path
) -> None:
    recipe, folder = harness.recipe(STEPS), tmp_path / "run"
    shutil.copytree(uninterrupted(recipe), folder)
    (folder / "result.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match=r"holds another run: lr is 0\.003 there and 0\.03 here"):
        quiet(replace(recipe, lr=0.03), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    quiet(recipe, folder)  # killed between its last checkpoint and its result
    assert harness.differences(folder, uninterrupted(recipe)) == []
