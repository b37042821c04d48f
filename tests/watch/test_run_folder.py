import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import trimtab
from trimtab.errors import RunFolderError
from trimtab.watch import Watch, runlog

ARRAYS = (
    "heads_entropy.f32",
    "heads_entropy_normalized.f32",
    "heads_max_logit.f32",
    "heads_logit_norm.f32",
    "heads_entropy_bound.f32",
)


def test_run_json_says_what_ran_where(tiny, tmp_path) -> None:
    facts = {"recipe": {"lr": 1e-3, "data": Path("digits"), "bound": float("inf")}, "seed": 7}
    with Watch(tiny(), tmp_path / "a" / "b", every=5, run=facts):
        info = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert info["format"] == 1
    assert info["trimtab"] == trimtab.__version__
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["every"] == 5
    assert info["started"].endswith("+00:00")
    assert {"python", "platform", "machine", "cpus"} <= info.keys()
    assert info["seed"] == 7
    assert info["recipe"] == {"lr": 1e-3, "data": "digits", "bound": "inf"}


def test_the_folder_holds_nothing_else(tiny, train, tmp_path) -> None:
    model = tiny()
    with Watch(model, tmp_path, every=1) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, watch.step)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"run.json", "steps.jsonl", "heads.json", *ARRAYS}


def test_a_folder_that_holds_a_run_is_left_alone(tiny, train, tmp_path) -> None:
    model = tiny()
    with Watch(model, tmp_path, every=1) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, watch.step)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunFolderError, match="already holds a run"):
        Watch(model, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_of_two_that_start_into_one_folder_one_is_refused(tiny, tmp_path, leaves_nothing) -> None:
    one, two = Watch(tiny(), tmp_path), Watch(second := tiny(), tmp_path)
    with one:
        with pytest.raises(RunFolderError, match="already holds a run"), two:
            pass
        leaves_nothing_of(second)
        one.step(1.0)
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 1
    leaves_nothing(second)


def leaves_nothing_of(model: torch.nn.Module) -> None:
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_folder_with_other_things_in_it_is_fine(tiny, tmp_path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with Watch(tiny(), tmp_path) as watch:
        watch.step(1.0)
    assert (tmp_path / "steps.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("inside", [False, True], ids=["a file", "inside a file"])
def test_a_folder_that_cannot_be_made(tiny, tmp_path, inside, leaves_nothing) -> None:
    (tmp_path / "file").write_text("mine")
    model = tiny()
    folder = tmp_path / "file" / "run" if inside else tmp_path / "file"
    with pytest.raises(RunFolderError, match="file"), Watch(model, folder):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    leaves_nothing(model)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tiny, tmp_path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="cannot write"), Watch(tiny(), tmp_path / "run"):
        pass


def test_attention_seen_late_keeps_rows_and_lines_together(tiny, train, tmp_path, caplog) -> None:
    """Lines without attention have rows of NaN, before the heads are known as well as after."""
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, tmp_path, every=1) as watch:
        watch.step(1.0)
        watch.step(1.0)
        train(model, optimizer, 1, watch.step)
        watch.step(1.0)
    assert "no attention was seen" in caplog.text
    for name in ARRAYS:
        rows = np.fromfile(tmp_path / name, dtype="<f4").reshape(4, 4)
        assert np.isnan(rows).all(axis=1).tolist() == [True, True, False, True]
        assert np.isfinite(rows[2]).all()


def test_heads_that_appear_later_are_told_of_and_left_out(tiny, train, tmp_path, caplog) -> None:
    model = tiny()
    attentions, model.attentions = model.attentions, model.attentions[:1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, tmp_path, every=1) as watch:
        model.mlps, mlps = model.mlps[:1], model.mlps
        train(model, optimizer, 1, watch.step)
        model.attentions, model.mlps = attentions, mlps
        train(model, optimizer, 2, watch.step)
    (record,) = caplog.records
    assert "attentions.1 head 0, attentions.1 head 1" in record.message
    assert np.fromfile(tmp_path / ARRAYS[0], dtype="<f4").shape == (3 * 2,)


@pytest.mark.parametrize("breaks_at", ["heads_entropy.f32", "heads_max_logit.f32", "steps.jsonl"])
def test_a_full_disk_ends_the_log_not_the_training(
    tiny, train, tmp_path, caplog, monkeypatch, breaks_at, leaves_nothing
) -> None:
    """The third line breaks off in the middle, as on a full disk; what was written before stays whole."""
    append, model = runlog._append, tiny()

    def full(file, record: bytes) -> None:
        if watch.last.get("step") == 2 and Path(file.name).name == breaks_at:
            append(file, record[: len(record) // 2])
            raise OSError(28, "No space left on device")
        append(file, record)

    monkeypatch.setattr(runlog, "_append", full)
    with Watch(model, tmp_path, every=1) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 5, watch.step)
    (record,) = caplog.records
    assert "No space left on device" in record.message
    assert "before step 3" in record.message
    assert [json.loads(line)["step"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()] == [1, 2]
    for name in ARRAYS:
        assert (tmp_path / name).stat().st_size == 2 * 4 * 4
    assert watch.last["step"] == 5  # live displays go on
    leaves_nothing(model)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_real_limit_on_file_size(tiny, train, tmp_path, caplog) -> None:
    import resource

    model = tiny()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Watch(model, tmp_path, every=1) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, watch.step)
        size = (tmp_path / "steps.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        try:
            train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, watch.step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Training goes on unlogged" in caplog.text
    assert (tmp_path / "steps.jsonl").stat().st_size == size
    assert (tmp_path / ARRAYS[0]).stat().st_size == 4 * 4


KILLED = """
import os, signal, sys, torch
import torch.nn.functional as F
from trimtab.watch import Watch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
    def forward(self, x):
        x = self.linear(x)[:, None]
        return F.scaled_dot_product_attention(x, x, x)

torch.set_num_threads(1)
model = Model()
with Watch(model, sys.argv[1], every=2) as watch:
    for step in range(1, 100):
        loss = model(torch.randn(2, 5, 4)).mean()
        watch.step(loss)
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_has_every_line_up_to_its_last_logged_step(tmp_path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run")], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    text = (tmp_path / "run" / "steps.jsonl").read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 4, 6]
    assert len(json.loads((tmp_path / "run" / "heads.json").read_text())["heads"]) == 1
    for name in ARRAYS:
        assert np.isfinite(np.fromfile(tmp_path / "run" / name, dtype="<f4")).sum() == 4


def test_a_disk_that_is_full_at_the_start_leaves_the_folder_for_another_try(tiny, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runlog, "write_json", full)
    with pytest.raises(RunFolderError, match="No space left"), Watch(tiny(), tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.undo()
    with Watch(tiny(), tmp_path / "run"):
        pass


def test_ctrl_c_while_a_line_is_written_shifts_no_row(tiny, train, tmp_path, monkeypatch) -> None:
    model, optimizer_of = tiny(), torch.optim.SGD
    whole, calls = runlog._append, []

    def interrupted(file, record: bytes) -> None:
        calls.append(file)
        if len(calls) == 10:  # the third array of the second line: 5 arrays, filled up and then appended to, and a line
            raise KeyboardInterrupt
        whole(file, record)

    with Watch(model, tmp_path, every=1) as watch:
        optimizer = optimizer_of(model.parameters(), lr=0.1)
        train(model, optimizer, 1, watch.step)
        calls[:] = [None] * 6
        monkeypatch.setattr(runlog, "_append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(model, optimizer, 1, watch.step)
        train(model, optimizer, 2, watch.step)
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for name in ARRAYS:
        rows = np.fromfile(tmp_path / name, dtype="<f4")
        assert len(rows) == 3 * 4
        assert np.isfinite(rows).all()


def test_a_folder_deleted_during_the_run_is_told_of_once(tiny, train, tmp_path, caplog) -> None:
    model = tiny()
    with Watch(model, tmp_path / "run", every=1) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, watch.step)
        shutil.rmtree(tmp_path / "run")
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, watch.step)
    (record,) = caplog.records
    assert "ends before step 2" in record.message
    assert "it was deleted" in record.message
