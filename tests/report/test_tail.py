import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import RunFolderError
from trimtab.report.runlog import read_run
from trimtab.report.tail import CURVES, HeadRow, Tail, read_more

HEADS = [{"module": "blocks.0.attention", "head": head} for head in range(3)]
ARRAYS = ("entropy", "entropy_normalized", "max_logit")


def begin(folder: Path, started: str = "now") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"started": started}))
    (folder / "steps.jsonl").write_text("")
    return folder


def append(folder: Path, step: int, **entries: Any) -> None:
    """One logged step as the run log writes it: the arrays' rows, then the line."""
    (folder / "heads.json").write_text(json.dumps({"heads": HEADS}))
    for scale, name in enumerate(ARRAYS, 1):
        with open(folder / f"heads_{name}.f32", "ab") as file:
            file.write((np.arange(3, dtype="<f4") * scale + step).tobytes())
    with open(folder / "steps.jsonl", "a") as file:
        file.write(json.dumps({"step": step, **entries}) + "\n")


def test_it_takes_in_what_is_new_and_only_that(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tail = read_more(Tail(folder))
    assert (tail.info, tail.last) == ({}, {})  # not there yet
    begin(folder)
    tail = read_more(tail)
    assert (tail.info, tail.last) == ({"started": "now"}, {})
    append(folder, 1, loss=2.5, lr=[0.1, 0.2], alarms=[{"kind": "dead head"}], time=0.5)
    tail = read_more(tail)
    assert tail.curves["loss"] == [2.5]
    assert tail.written == pytest.approx(os.stat(folder / "steps.jsonl").st_mtime)
    append(folder, 20, loss="nan", max_logit="inf", alarms=[])
    append(folder, 40, loss=1.5, alarms=[{"kind": "loss spike"}])
    again = read_more(read_more(tail))
    assert again is tail
    assert tail.last["step"] == 40
    np.testing.assert_equal(tail.curves["loss"], [2.5, math.nan, 1.5])
    assert tail.curves["lr"] == [0.1]  # the first group's, of the lines that have one
    assert tail.curves["max_logit"] == [math.inf]
    assert [alarm["kind"] for alarm in tail.alarms] == ["dead head", "loss spike"]
    assert tail.heads == [HeadRow(f"blocks.0.attention head {i}", 40 + i, 40 + 2 * i, 40 + 3 * i) for i in range(3)]
    assert tail.result == {}
    (folder / "result.json").write_text('{"status": "finished"}')
    assert read_more(tail).result == {"status": "finished"}


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 400), max_size=6))
def test_however_it_is_cut_it_reads_what_read_run_reads(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    """The log arrives in pieces that end anywhere, as it does while another process writes."""
    whole = begin(tmp_path_factory.mktemp("whole"))
    for step in range(1, 6):
        append(whole, step, loss=1 / step, lr=[0.1 * step], grad_norm="inf", time=float(step))
    growing = begin(tmp_path_factory.mktemp("growing"))
    for name in ("heads.json", *(f"heads_{array}.f32" for array in ARRAYS)):
        (growing / name).write_bytes((whole / name).read_bytes())
    content = (whole / "steps.jsonl").read_bytes()
    tail = Tail(growing)
    for end in [*sorted(cuts), len(content)]:
        (growing / "steps.jsonl").write_bytes(content[:end])
        tail = read_more(tail)
    run = read_run(whole)
    assert tail.last == run.lines[-1]
    for name in CURVES:
        expected = run.column(name)
        assert tail.curves[name] == expected[~np.isnan(expected)].tolist()
    assert [head.name for head in tail.heads] == run.heads
    np.testing.assert_equal([head.normalized for head in tail.heads], run.entropy_normalized[-1])


@pytest.mark.parametrize("longer", [False, True])
def test_a_run_that_begins_anew_is_read_anew(tmp_path: Path, longer: bool) -> None:
    folder = begin(tmp_path / "run")
    for step in (1, 2, 3):
        append(folder, step, loss=1.0)
    tail = read_more(Tail(folder))
    for file in folder.iterdir():
        file.unlink()
    begin(folder, started="later")
    for step in range(1, 6 if longer else 3):
        append(folder, step, loss=5.0)
    tail = read_more(tail)
    assert set(tail.curves["loss"]) == {5.0}
    assert tail.last["step"] == (5 if longer else 2)
    assert tail.heads[0].entropy == tail.last["step"]


def test_rows_that_are_missing_or_torn_are_unknown(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    append(folder, 1)
    (folder / "heads_entropy.f32").unlink()
    (folder / "heads_max_logit.f32").write_bytes(bytes(11))
    (head, *_) = read_more(Tail(folder)).heads
    assert head.normalized == 1.0
    assert math.isnan(head.entropy)
    assert math.isnan(head.max_logit)


def test_folders_that_hold_no_single_run(tmp_path: Path) -> None:
    begin(tmp_path / "a")
    begin(tmp_path / "b")
    with pytest.raises(RunFolderError, match=r"holds 2 runs: name one, such as .*/a"):
        read_more(Tail(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        read_more(Tail(tmp_path / "file"))
    (tmp_path / "a" / "run.json").write_text('{"recipe": ')
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        read_more(Tail(tmp_path / "a"))


def test_a_damaged_line_ends_the_reading_as_it_does_for_read_run(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    append(folder, 1, loss=2.5)
    with open(folder / "steps.jsonl", "ab") as file:
        file.write(b"\0\0\0\0\n")  # a block that a power loss left empty
    append(folder, 3, loss=1.5)
    tail = read_more(Tail(folder))
    assert tail.curves["loss"] == [2.5]
    assert read_more(tail).last["step"] == 1
    assert [line["step"] for line in read_run(folder).lines] == [1]
