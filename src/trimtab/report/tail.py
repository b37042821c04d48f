"""Follow a run folder while it grows: what a live view needs, each byte of the log read once."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import RunFolderError

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
    info = _json(tail.folder / "run.json")
    result = _json(tail.folder / "result.json")  # before the lines: when it is there, they are all there
    try:
        with open(tail.folder / "steps.jsonl", "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size < tail._offset or info != tail.info:
                tail = Tail(tail.folder, info)
            file.seek(tail._offset)
            new = file.read()
    except FileNotFoundError:
        return Tail(tail.folder, info)
    whole = new[: new.rfind(b"\n") + 1]
    tail._offset += len(whole)
    for text in whole.splitlines():
        _add(tail, json.loads(text))
    if whole:
        tail.heads, tail.written = _heads(tail), status.st_mtime
    tail.result = result
    return tail


def number(value: Any) -> float:
    """A logged value as a float: of a list the first; NaN for what is not there; "nan" and "inf" as numbers."""
    if isinstance(value, list):
        value = value[0] if value else None
    return float("nan") if value is None else float(value)


def _add(tail: Tail, line: dict[str, Any]) -> None:
    tail.last = line
    for name, values in tail.curves.items():
        if name in line:
            values.append(number(line[name]))
    tail.times.append(number(line.get("time")))
    tail.alarms += line.get("alarms", [])


def _heads(tail: Tail) -> list[HeadRow]:
    """The last row of each per-head array."""
    if not tail._names:
        heads = _json(tail.folder / "heads.json").get("heads", [])
        tail._names = [f"{head['module']} head {head['head']}" for head in heads]
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


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        raise RunFolderError(f"{path} is damaged: it is not the JSON that was written there") from None
