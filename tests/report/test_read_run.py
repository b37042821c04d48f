import json
import math
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import RunFolderError
from trimtab.report.runlog import read_run

HEADS = [{"module": "blocks.0.attention", "head": 0}, {"module": "blocks.0.attention", "head": 1}]


def write(folder: Path) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"recipe": {"lr": 0.1}, "seed": 3}))
    alarm = {"step": 2, "kind": "entropy collapse", "where": "blocks.0.attention head 1"}
    steps = [
        {"step": 1, "loss": 2.5, "lr": [0.1, 0.2], "alarms": []},
        {"step": 2, "loss": "nan", "accuracy": 0.5, "alarms": [alarm]},
        {"step": 4, "loss": "inf"},
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    (folder / "heads.json").write_text(json.dumps({"heads": HEADS}))
    for scale, name in enumerate(("entropy", "entropy_normalized", "max_logit"), 1):
        rows = np.array([[1, 2], [3, 4], [np.nan, np.nan]], dtype="<f4") * scale
        (folder / f"heads_{name}.f32").write_bytes(rows.tobytes())
    return folder


def test_everything_that_was_written_is_read(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "run"))
    assert run.info == {"recipe": {"lr": 0.1}, "seed": 3}
    assert run.steps.tolist() == [1, 2, 4]
    loss = run.column("loss")
    assert (loss[0], loss[2]) == (2.5, math.inf)
    assert math.isnan(loss[1])
    np.testing.assert_equal(run.column("accuracy"), [np.nan, 0.5, np.nan])
    np.testing.assert_equal(run.column("lr"), [0.1, np.nan, np.nan])  # the first group's
    assert run.heads == ["blocks.0.attention head 0", "blocks.0.attention head 1"]
    np.testing.assert_equal(run.entropy, np.array([[1, 2], [3, 4], [np.nan, np.nan]], np.float32))
    assert run.entropy_normalized[1].tolist() == [6, 8]
    assert run.max_logit[1].tolist() == [9, 12]
    assert [alarm["where"] for alarm in run.alarms] == ["blocks.0.attention head 1"]
    assert run.result == {}


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_torn_last_line_is_ignored_with_its_rows(tmp_path: Path, cut: int) -> None:
    folder = write(tmp_path / "run")
    log = folder / "steps.jsonl"
    log.write_bytes(log.read_bytes()[:-cut])
    run = read_run(folder)
    assert run.steps.tolist() == [1, 2]
    assert run.entropy.tolist() == [[1, 2], [3, 4]]


def test_torn_array_tails_become_unknown(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    array = folder / "heads_entropy.f32"
    array.write_bytes(array.read_bytes()[: 8 + 5])  # one whole row, then a number and a byte
    (folder / "heads_max_logit.f32").unlink()
    run = read_run(folder)
    np.testing.assert_equal(run.entropy, np.array([[1, 2], [np.nan] * 2, [np.nan] * 2], np.float32))
    assert np.isnan(run.max_logit).all()
    assert run.max_logit.shape == (3, 2)


def test_a_run_without_attention_has_no_heads(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    for file in folder.glob("heads*"):
        file.unlink()
    run = read_run(folder)
    assert run.heads == []
    assert run.entropy.shape == (3, 0)


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"there is no run folder .*nowhere"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"holds no run: it has no run\.json"):
        read_run(tmp_path)
    folder = write(tmp_path / "run")
    (folder / "steps.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(RunFolderError, match="has no logged step yet"):
        read_run(folder)
    (folder / "steps.jsonl").unlink()
    with pytest.raises(RunFolderError, match="has no logged step yet"):
        read_run(folder)


def test_a_damaged_run_json_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    (folder / "run.json").write_text('{"recipe": ')
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        read_run(folder)
