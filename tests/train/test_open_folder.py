import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from trimtab.errors import RunFolderError
from trimtab.train import folder as run_folder
from trimtab.train.checkpoints import save_checkpoint
from trimtab.train.folder import open_folder
from trimtab.train.progress import Result, write_result
from trimtab.train.state import TrainState
from trimtab.watch.runlog import RunLog, run_info

RECIPE = {"lr": 0.01, "model": {"depth": 2, "width": 8}, "betas": (0.9, 0.99)}
RUN = {"task": "Digits", "recipe": RECIPE, "processes": 1}


def begun(folder: Path, **facts: Any) -> Path:
    """A folder in which a run has begun."""
    RunLog(folder, run_info(1, RUN | {"seed": 3}) | facts).close()
    return folder


def checkpoint(folder: Path, step: int) -> Path:
    save_checkpoint(folder, TrainState(nn.Linear(1, 1), [], step=step), keep=5, best=False)
    return folder / "checkpoints" / f"step-{step:08d}"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_is_made_and_left_clean(tmp_path: Path) -> None:
    with open_folder(tmp_path / "a" / "b", RUN) as found:
        assert found == (None, None)
        assert (tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    begun(tmp_path)
    with open_folder(tmp_path, RUN) as found:
        assert found == (None, None)
    checkpoint(tmp_path, 3)
    newest = checkpoint(tmp_path, 12)
    with open_folder(tmp_path, RUN) as found:
        assert found == (newest, None)


def test_a_run_that_has_ended_has_a_result(tmp_path: Path) -> None:
    begun(tmp_path)
    checkpoint(tmp_path, 3)
    result = Result(tmp_path, "diverged", 3, math.inf, 1.5, 0.1, 10.0, 20.0, 5, best={"accuracy": 0.5})
    write_result(result)
    with open_folder(tmp_path, RUN) as found:
        assert found == (None, result)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": {**RECIPE, "lr": 0.03}}, r"lr is 0\.01 there and 0\.03 here"),
        ({"recipe": {**RECIPE, "model": {"depth": 2, "width": 9}}}, "model.width is 8 there and 9 here"),
        (
            {"recipe": {**RECIPE, "betas": (0.9, 0.95)}},
            r"betas is \[0\.9, 0\.99\] there and \[0\.9, 0\.95\] here",
        ),
        ({"recipe": {**RECIPE, "clip": None}}, "clip is absent there and None here"),
        ({"recipe": {"lr": 0.01, "betas": (0.9, 0.99)}}, "model is .* there and absent here"),
        ({"task": "Words"}, "task is Digits there and Words here"),
    ],
    ids=["lr", "nested", "tuple", "new field", "lost field", "task"],
)
def test_another_recipe_is_refused_by_the_first_field_that_differs(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    begun(tmp_path)
    checkpoint(tmp_path, 3)
    before = files_in(tmp_path)
    with pytest.raises(RunFolderError, match=f"holds another run: {words}"), open_folder(tmp_path, RUN | change):
        pass
    assert files_in(tmp_path) == before


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds what no run wrote \(thesis.tex\)"), open_folder(tmp_path, RUN):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunFolderError, match="file"), open_folder(place, RUN):
            pass


@pytest.mark.parametrize(
    "left", [["run.json.part"], ["steps.jsonl"], ["steps.jsonl", "run.json.part"], [".nfs0001"], ["error.json"]]
)
def test_what_a_kill_at_the_start_leaves_is_no_obstacle(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).touch()
    with open_folder(tmp_path, RUN) as found:
        assert found == (None, None)


@pytest.mark.parametrize("content", [None, b"", b"[1]", b'{"task": '], ids=["missing", "empty", "list", "torn"])
def test_a_run_that_does_not_say_what_it_is_is_refused(tmp_path: Path, content: bytes | None) -> None:
    begun(tmp_path)
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n')
    if content is None:
        (tmp_path / "run.json").unlink()
    else:
        (tmp_path / "run.json").write_bytes(content)
    with (
        pytest.raises(RunFolderError, match=r"run\.json, which tells of which recipe it is, is"),
        open_folder(tmp_path, RUN),
    ):
        pass


def test_a_damaged_result_is_told_of(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "result.json").write_text('{"status": "fin')
    with pytest.raises(RunFolderError, match=r"result\.json is damaged"), open_folder(tmp_path, RUN):
        pass


def test_other_versions_and_devices_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun(tmp_path, torch="1.0", threads=999, accelerator="cpu")
    with open_folder(tmp_path, RUN | {"accelerator": "cuda", "arm": "sigma"}):
        pass
    (record,) = caplog.records
    assert "torch 1.0 then, " in record.message
    assert "threads 999 then, " in record.message
    assert "accelerator cpu then, cuda now" in record.message
    assert "not the same bit for bit" in record.message


def test_the_same_conditions_are_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun(tmp_path)
    with open_folder(tmp_path, RUN):
        pass
    assert not caplog.records


HOLDER = """
import sys
from pathlib import Path
from trimtab.train.folder import open_folder
with open_folder(Path(sys.argv[1]), {"task": "Digits", "recipe": {}}):
    print("in", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_of_two_processes_in_one_folder_one_is_refused_until_the_other_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"in\n"
        with (
            pytest.raises(RunFolderError, match=f"process {holder.pid} on .* is training into .* at this moment"),
            open_folder(tmp_path, RUN),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (tmp_path / ".lock").exists()  # it had no time to tidy up
        with open_folder(tmp_path, RUN) as found:
            assert found == (None, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_a_lock_that_its_holder_removed_just_now_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening and the locking of the file its last holder leaves: then it is a file without a name."""
    import fcntl

    lock, calls = fcntl.flock, []

    def late(number: int, how: int) -> None:
        lock(number, how)
        calls.append(number)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with open_folder(tmp_path, RUN):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(RunFolderError, match="is training into"), open_folder(tmp_path, RUN):
            pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with open_folder(tmp_path, RUN) as found:
        assert found == (None, None)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "open", full)
    with pytest.raises(RunFolderError, match=r"cannot write to .*No space left"), open_folder(tmp_path, RUN):
        pass


def test_a_whole_number_is_the_same_as_a_float(tmp_path: Path) -> None:
    begun(tmp_path, recipe=RECIPE | {"lr": 1})
    with open_folder(tmp_path, RUN | {"recipe": RECIPE | {"lr": 1.0}}) as found:
        assert found == (None, None)
    with pytest.raises(RunFolderError, match="lr is 1 there"), open_folder(tmp_path, RUN | {"recipe": {"lr": True}}):
        pass


def test_numbers_that_json_cannot_hold_compare_equal(tmp_path: Path) -> None:
    run = RUN | {"recipe": {"lr": math.inf, "path": Path("x")}}
    RunLog(tmp_path, run_info(1, run)).close()
    with open_folder(tmp_path, run) as found:
        assert found == (None, None)


def test_results_read_back_as_they_were(tmp_path: Path) -> None:
    result = Result(tmp_path, "finished", 3, 1.0, 1.5, 0.1, 10.0, 20.0, 5, metric="loss", metrics={"loss": -math.inf})
    begun(tmp_path)
    for each in (result, replace(result, metric=None, test={"accuracy": 1.0})):
        write_result(each)
        with open_folder(tmp_path, RUN) as found:
            assert found.result == each
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == {"loss": "-inf"}
