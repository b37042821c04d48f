"""What a run tells while it goes on, and when it has ended."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import RunFolderError
from trimtab.watch.runlog import write_json

Status = Literal["finished", "diverged", "stopped early", "out of time", "interrupted"]


@dataclass(frozen=True)
class Progress:
    """What is known at a logged step.

    Attributes:
        step: optimiser steps taken.
        steps: optimiser steps asked for.
        loss: of this step's batch.
        lr: learning rate of this step.
        metrics: of the last evaluation; empty before the first.
        entropy_min: lowest attention entropy over the heads, divided by its maximum (0 to 1); None if unseen.
        worst_head: the name of that head; None if unseen.
        alarms: what every alarm so far said, oldest first.
        seconds: of training so far, in all processes that have worked on the run one after another.
        samples_per_second: examples trained on in a second, lately.
    """

    step: int
    steps: int
    loss: float
    lr: float
    metrics: dict[str, float]
    entropy_min: float | None
    worst_head: str | None
    alarms: tuple[str, ...]
    seconds: float
    samples_per_second: float


@dataclass(frozen=True)
class Result:
    """How a run ended; all but the folder is in its result.json, with floats that are not finite as strings.

    Attributes:
        folder: the run folder.
        status: "finished"; "diverged" when the loss or a weight left the finite numbers (such a run stops at its
            next logged step); "stopped early" by its patience; "out of time"; or "interrupted" by Ctrl-C or SIGTERM,
            which alone writes no result.json, so that the same command goes on.
        steps: optimiser steps taken.
        loss: of the last batch.
        initial: the metrics before the first step.
        metrics: the metrics of the weights that the run keeps.
        best: the best metrics seen, as far as `metric` decides.
        best_step: the step they were measured at.
        test: the metrics on the test examples.
        metric: the name of the metric that decides; None when nothing was measured.
        higher_is_better: whether more of it is better.
        seconds: of training, evaluation included.
        step_seconds: the median time of a step, without evaluation and log.
        samples_per_second: examples trained on in a second of such steps.
        loader_samples_per_second: examples that the loader alone makes in a second.
        peak_memory_bytes: the largest resident memory of the process, or of its GPU.
    """

    folder: Path
    status: Status
    steps: int
    loss: float
    seconds: float
    step_seconds: float
    samples_per_second: float
    loader_samples_per_second: float
    peak_memory_bytes: int
    initial: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    test: dict[str, float] = field(default_factory=dict)
    metric: str | None = None
    higher_is_better: bool = False


RESULT = "result.json"


def write_result(result: Result) -> None:
    """Write result.json into the run's folder, aside and then renamed.

    Raises:
        RunFolderError: the disk is full.
    """
    content = asdict(result)
    del content["folder"]
    try:
        write_json(result.folder / RESULT, content)
    except OSError as error:
        raise RunFolderError(
            f"cannot write {result.folder / RESULT}: {error.strerror or error}. All is saved: make room, and the "
            "same command ends the run"
        ) from error


def read_result(folder: Path) -> Result | None:
    """Read result.json back; None if the run has none.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {each.name: content[each.name] for each in fields(Result) if each.name != "folder"}
        return Result(folder=folder, **{name: _as_written(name, value) for name, value in known.items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged ({error}): remove it, and the run ends once more") from None


def _as_written(name: str, value: Any) -> Any:
    """Floats that are not finite are strings in the file."""
    if isinstance(value, dict):
        return {key: float(entry) for key, entry in value.items()}
    return float(value) if isinstance(value, str) and name not in ("status", "metric") else value
