"""Follow a run folder while it grows: what a live view needs, each byte of the log read once."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import RunFolderError
from trimtab.report.runlog import head_names, number, read_json

CURVES = ("loss", "lr", "grad_norm", "entropy_min", "entropy_mean", "max_logit")


@dataclass(frozen=True)
class HeadRow:
    """One attention head at the last logged step; NaN where it was not seen.

    Attributes:
        name: module and number, e.g. "blocks.0.attention head 3".
        entropy: nats.
        normalized: entropy over its maximum, 0 to 1.
        max_logit: largest attention logit.
    """

    name: str
    entropy: float
    normalized: float
    max_logit: float


@dataclass
class Tail:
    """A run as far as it has been read; `read_more` takes it further.

    Attributes:
        folder: where it lies.
        info: run.json; empty before the run began.
        last: the last logged line; empty before the first.
        curves: every value so far of the numbers in `CURVES`.
        times: seconds since the run began, of each line.
        alarms: every alarm so far, oldest first.
        heads: the heads at the last logged step; empty when none was seen.
        result: result.json; empty while the run goes on.
        written: when the last line was written, seconds since the epoch; 0 before the first.
    """

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CURVES})
    times: list[float] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    heads: list[HeadRow] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    written: float = 0.0
    _offset: int = 0  # bytes of steps.jsonl that have been read: whole lines only
    _names: list[str] = field(default_factory=list)


def read_more(tail: Tail) -> Tail:
    """Read what was logged since the last time.

    A torn last line waits for its rest. A folder that began anew is read anew; one that is not there yet is empty.

    Returns:
        The same tail, or a new one when the folder began anew.

    Raises:
        RunFolderError: the folder is a file, holds several runs, or its run.json is damaged.
    """
    _check(tail.folder)
    info = read_json(tail.folder / "run.json")
    result = read_json(tail.folder / "result.json")  # before the lines: when it is there, they are all there
    try:
        with open(tail.folder / "steps.jsonl", "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size < tail._offset or info != tail.info:
                tail = Tail(tail.folder, info)
            file.seek(tail._offset)
            new = file.read()
    except FileNotFoundError:
        return Tail(tail.folder, info)
    before = tail._offset
    for text in new[: new.rfind(b"\n") + 1].splitlines(keepends=True):
        try:
            _add(tail, dict(json.loads(text)))
        except (ValueError, TypeError):  # damaged: reading ends here, as in `read_run`
            break
        tail._offset += len(text)
    if tail._offset > before:
        tail.heads, tail.written = _heads(tail), status.st_mtime
    tail.result = result
    return tail


def _add(tail: Tail, line: dict[str, Any]) -> None:
    """Take in a line; raises, with nothing taken in, where it is none that a Watch writes."""
    new = {name: number(line[name]) for name in tail.curves if name in line}
    step, time = number(line.get("step")), number(line.get("time"))
    if math.isnan(step):
        raise ValueError("a line without a step")
    alarms = [dict(alarm) for alarm in line.get("alarms", [])]
    for name, value in new.items():
        tail.curves[name].append(value)
    tail.last = line
    tail.times.append(time)
    tail.alarms += alarms


def _heads(tail: Tail) -> list[HeadRow]:
    """The last row of each per-head array."""
    if not tail._names:
        tail._names = head_names(tail.folder)
    columns = [_row(tail, name) for name in ("entropy", "entropy_normalized", "max_logit")]
    return [HeadRow(name, *numbers) for name, *numbers in zip(tail._names, *columns, strict=True)]


def _row(tail: Tail, array: str) -> list[float]:
    bytes_per_row = 4 * len(tail._names)
    try:
        with open(tail.folder / f"heads_{array}.f32", "rb") as file:
            file.seek((len(tail.times) - 1) * bytes_per_row)
            row = file.read(bytes_per_row)
    except FileNotFoundError:
        row = b""
    if len(row) < bytes_per_row:
        return [float("nan")] * len(tail._names)
    return [float(value) for value in np.frombuffer(row, dtype="<f4")]


def _check(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; name the folder of a run")
    if folder.is_dir() and not (folder / "run.json").exists():
        runs = sorted(path.parent for path in folder.glob("*/run.json"))
        if runs:
            raise RunFolderError(f"{folder} holds {len(runs)} runs: name one, such as {runs[0]}")
