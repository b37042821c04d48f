"""Read a run folder back: pure functions over JSON and NumPy, which import nothing else of Trimtab's.

A run may still be going, or may have been killed at any moment: a torn last line and torn array tails are
ignored.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import RunFolderError

Floats = NDArray[np.float64]

_HEAD_ARRAYS = ("entropy", "entropy_normalized", "max_logit", "logit_norm", "entropy_bound")


@dataclass(frozen=True)
class Run:
    """One run, as far as it was logged.

    Attributes:
        folder: where it lies.
        info: run.json: recipe, seed, versions, machine.
        lines: the lines of steps.jsonl, one dict per logged step, as written.
        heads: a name for each attention head, e.g. "blocks.0.attention head 3"; empty when none was seen.
        entropy: (lines, heads), nats; NaN where it was not seen.
        entropy_normalized: (lines, heads), entropy divided by its maximum, 0 to 1.
        max_logit: (lines, heads), largest attention logit.
        logit_norm: (lines, heads), mean norm of a query's logits about their mean.
        entropy_bound: (lines, heads), nats: the least entropy that logits of that norm allow, mean over queries.
        result: result.json, or an empty dict when the run did not end.
    """

    folder: Path
    info: dict[str, Any]
    lines: list[dict[str, Any]]
    heads: list[str]
    entropy: NDArray[np.float32]
    entropy_normalized: NDArray[np.float32]
    max_logit: NDArray[np.float32]
    logit_norm: NDArray[np.float32]
    entropy_bound: NDArray[np.float32]
    result: dict[str, Any]

    def column(self, name: str) -> Floats:
        """One number per logged step, (lines,); NaN where the line has none. Of a list, the first entry."""
        return np.array([number(line.get(name)) for line in self.lines], dtype=np.float64)

    @property
    def steps(self) -> Floats:
        """The logged steps, (lines,), counted from 1."""
        return self.column("step")

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """Every alarm of the run, oldest first."""
        return [alarm for line in self.lines for alarm in line.get("alarms", [])]


def read_run(folder: str | Path) -> Run:
    """Read one run folder.

    Args:
        folder: a folder that `trimtab.Watch` wrote to.

    Returns:
        What was logged, as far as it is whole.

    Raises:
        RunFolderError: there is no such folder, no run in it, not one whole line, or run.json cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunFolderError(f"there is no run folder {folder}")
    if not (folder / "run.json").is_file():
        raise RunFolderError(f"{folder} holds no run: it has no run.json; name the folder of one run")
    lines = _lines(folder / "steps.jsonl")
    if not lines:
        raise RunFolderError(f"{folder} has no logged step yet; its run ended or was stopped before the first one")
    heads = head_names(folder)
    arrays = {name: _rows(folder / f"heads_{name}.f32", len(lines), len(heads)) for name in _HEAD_ARRAYS}
    return Run(
        folder=folder,
        info=read_json(folder / "run.json"),
        lines=lines,
        heads=heads,
        result=read_json(folder / "result.json"),
        **arrays,
    )


def head_names(folder: Path) -> list[str]:
    """A name for each attention head of a run, e.g. "blocks.0.attention head 3"."""
    return [f"{head['module']} head {head['head']}" for head in read_json(folder / "heads.json").get("heads", [])]


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file, {} if there is none; RunFolderError if it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        raise RunFolderError(f"{path} is damaged: it is not the JSON that was written there") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; reading ends at the first that is torn."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is torn or empty
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            break
    return lines


def _rows(path: Path, num_rows: int, num_heads: int) -> NDArray[np.float32]:
    """The (num_rows, num_heads) array; missing and torn rows are NaN, rows without a line are left out."""
    rows = np.full((num_rows, num_heads), np.nan, dtype=np.float32)
    if path.is_file() and num_heads:
        content = path.read_bytes()
        whole = min(num_rows, len(content) // (4 * num_heads))
        flat = np.frombuffer(content, dtype="<f4", count=whole * num_heads)
        rows[:whole] = flat.reshape(whole, num_heads)
    return rows


def number(value: Any) -> float:
    """A logged value as a float; the log writes non-finite ones as "nan", "inf" and "-inf"."""
    if isinstance(value, list):
        value = value[0] if value else None
    return float("nan") if value is None else float(value)
