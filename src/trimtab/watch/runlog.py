"""Write a run folder: run.json, steps.jsonl, and the per-head arrays beside it.

Everything is appended with one write per record, arrays before the line they belong to, so that a process killed at
any moment loses nothing before its last whole line.
"""

import contextlib
import errno
import json
import logging
import math
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab.errors import RunFolderError
from trimtab.watch.alarms import Head, Reading

logger = logging.getLogger("trimtab")

FORMAT = 1
STEPS = "steps.jsonl"
_ARRAY_OF = {"normalized": "entropy_normalized", "bound": "entropy_bound"}  # the others are called as their field
ARRAYS = tuple(f"heads_{_ARRAY_OF.get(field, field)}.f32" for field in Reading._fields)


class RunLog:
    """The writer of one run folder.

    A line that cannot be written (a full disk) is taken back, one warning is logged, and nothing more is written:
    training is worth more than its log.

    Args:
        folder: is made if it is not there.
        run_info: what run.json says, as `run_info` returns it.
        resume: whether a run that is there is continued: its run.json and its whole lines stay, what a kill has torn
            is cut off, and lines up to the last that is there are not written again.

    Attributes:
        last_step: the last step that the log held when it was opened; 0 of a new one.

    Raises:
        RunFolderError: the folder cannot be written to, or already holds a run that is not to be resumed.
    """

    def __init__(self, folder: Path, run_info: Mapping[str, Any], *, resume: bool = False) -> None:
        if not resume:
            refuse_used(folder)
        self.last_step = 0
        self._folder = folder
        self._files: list[FileIO] = []  # steps.jsonl, then the arrays in the order of ARRAYS; empty when it is over
        self._heads: list[Head] = []
        self._num_lines = 0
        self._told_late = False
        goes_on = resume and (folder / STEPS).exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if goes_on:
                self._go_on()
                if not (folder / "run.json").exists():
                    write_json(folder / "run.json", run_info)
                return
            # Exclusive: of two processes that start into one folder, one is refused.
            self._files.append(open(folder / STEPS, "xb", buffering=0))  # noqa: SIM115 - open until close
            write_json(folder / "run.json", run_info)
        except OSError as error:
            begun = bool(self._files) and not goes_on
            self.close()
            if begun:  # what was begun here would be taken for a run
                for name in (STEPS, "run.json", "run.json.part"):
                    (folder / name).unlink(missing_ok=True)
            raise _cannot_write(folder, error) from error

    def write(self, line: Mapping[str, Any], readings: Mapping[Head, Reading]) -> bool:
        """Append one logged step, a row to each array, then the line; return False where it is there already."""
        if line["step"] <= self.last_step:
            return False
        if not self._files:
            return True
        sizes: dict[FileIO, int] = {}
        try:
            if os.fstat(self._files[0].fileno()).st_nlink == 0:
                raise OSError(errno.ENOENT, "it was deleted")
            if readings and not self._heads:
                self._begin_arrays(list(readings))
            sizes = {file: os.fstat(file.fileno()).st_size for file in self._files}
            rows = self._rows(readings)
            for array, file in enumerate(self._files[1:]):
                _append(file, rows[:, array].tobytes())
            _append(self._files[0], (to_json(line) + "\n").encode())
            self._num_lines += 1
        except OSError as error:
            _cut(sizes)
            self.close()
            logger.warning(
                "the run log in %s ends before step %s: %s. Training goes on unlogged.",
                self._folder,
                line.get("step"),
                error.strerror or error,
            )
        except BaseException:  # Ctrl-C: half a row would shift all that follow
            _cut(sizes)
            raise
        return True

    def close(self) -> None:
        """Close the files; what is written afterwards is dropped."""
        for file in self._files:
            file.close()
        self._files = []

    def _go_on(self) -> None:
        """Open the files of the run that is there, all with as many rows as there are whole lines."""
        lines = open(self._folder / STEPS, "r+b", buffering=0)  # noqa: SIM115 - open until close
        self._files.append(lines)
        size = 0
        for line in lines.readall().splitlines(keepends=True):
            step = _step_of(line)
            if step is None:
                break
            self.last_step, self._num_lines, size = step, self._num_lines + 1, size + len(line)
        lines.truncate(size)
        lines.seek(size)
        if not (self._folder / "heads.json").exists():
            return
        try:
            named = json.loads((self._folder / "heads.json").read_text(encoding="utf-8"))["heads"]
            self._heads = [Head(head["module"], head["head"]) for head in named]
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise RunFolderError(
                f"{self._folder / 'heads.json'}, which names the rows of the arrays beside it, is damaged ({error}): "
                "choose another folder"
            ) from None
        row = 4 * len(self._heads)
        for name in ARRAYS:
            path = self._folder / name
            path.touch()
            self._files.append(open(path, "r+b", buffering=0))  # noqa: SIM115 - open until close
            whole = min(path.stat().st_size // row, self._num_lines)
            self._files[-1].truncate(whole * row)
            self._files[-1].seek(whole * row)
            _append(self._files[-1], self._unseen(self._num_lines - whole))

    def _unseen(self, lines: int) -> bytes:
        """Rows of lines without attention."""
        return np.full(lines * len(self._heads), math.nan, dtype="<f4").tobytes()

    def _rows(self, readings: Mapping[Head, Reading]) -> NDArray[np.float32]:
        """The readings of the named heads, (heads, fields); NaN for those that were not seen."""
        late = [str(head) for head in readings if head not in self._heads]
        if late and not self._told_late:
            self._told_late = True
            logger.warning("heads that the first logged step did not have are not logged: %s", ", ".join(late))
        unseen = Reading(*(math.nan for _ in Reading._fields))
        rows = np.array([readings.get(head, unseen) for head in self._heads], dtype=np.float64)
        with np.errstate(over="ignore"):  # inf is what float32 has for it
            return rows.reshape(-1, len(Reading._fields)).astype("<f4")

    def _begin_arrays(self, heads: list[Head]) -> None:
        """Name the heads, and give the lines before attention was first seen their rows of NaN."""
        write_json(self._folder / "heads.json", {"heads": [head._asdict() for head in heads]})
        self._heads = heads
        for name in ARRAYS:
            self._files.append(open(self._folder / name, "wb", buffering=0))  # noqa: SIM115 - open until close
            _append(self._files[-1], self._unseen(self._num_lines))


def refuse_used(folder: Path) -> None:
    """Raise RunFolderError when the folder is a file or already holds a run."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; a run needs a folder of its own")
    if (folder / STEPS).exists():
        raise RunFolderError(
            f"{folder} already holds a run ({STEPS}); nothing of it was touched. "
            "Choose another folder, or remove this one first"
        )


def run_info(every: int, run: Mapping[str, Any] | None) -> dict[str, Any]:
    """What run.json says: versions, machine, start, and the caller's own facts (recipe, seeds, ...).

    Raises:
        TypeError: a fact that JSON cannot hold.
        ValueError: a fact under a name that Watch itself uses, with another value.
    """
    import trimtab  # here, because the package imports this module while it is itself being imported

    info = {
        "format": FORMAT,
        "trimtab": trimtab.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "every": every,
    }
    for name, value in (run or {}).items():
        if name in info and info[name] != value:
            raise ValueError(f"run.json already says {name}={info[name]!r}; give {value!r} another name in `run`")
        try:
            to_json(value)
        except TypeError as error:
            raise TypeError(f"run[{name!r}] cannot be written as JSON ({error}): give plain values") from None
        info[name] = value
    return info


def to_json(value: Any) -> str:
    """Strict JSON: numbers that are not finite become the strings "nan", "inf" and "-inf", which float() reads."""
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False)


def write_json(path: Path, value: Any) -> None:
    """Write JSON aside, then rename it: the file is there whole or not at all."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(to_json(value) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return str(value) if isinstance(value, Path) else value


def _step_of(line: bytes) -> int | None:
    """The step of a line of the log; None of one that is torn."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _cut(sizes: Mapping[FileIO, int]) -> None:
    for file, size in sizes.items():
        with contextlib.suppress(OSError):
            file.truncate(size)
            file.seek(size)


def _append(file: FileIO, record: bytes) -> None:
    """Write all of it; one call of the system unless the disk is nearly full."""
    rest = memoryview(record)
    while rest:
        rest = rest[file.write(rest) :]


def _cannot_write(folder: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"cannot write a run to {folder}: {error.strerror or error}. Choose another folder")
