"""The run log of a run, with `Watch` looking on or without."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trimtab.watch import Alarm
from trimtab.watch.alarms import Head, Reading
from trimtab.watch.runlog import RunLog, run_info


class PlainLog:
    """Writes step, loss, learning rates and metrics, and looks at nothing; it is used as a `Watch` is.

    Args:
        optimizers: whose learning rates are logged.
        folder: of the run.
        every: steps from one line to the next.
        run: facts for run.json.
        writes: whether this is the process that writes.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], folder: Path, every: int, run: Mapping[str, Any], writes: bool
    ) -> None:
        self.alarms: list[Alarm] = []
        self.last: dict[str, Any] = {}
        self._optimizers, self._folder, self._every, self._run, self._writes = optimizers, folder, every, run, writes
        self._steps = 0
        self._log: RunLog | None = None
        self._before = 0.0

    def __enter__(self) -> "PlainLog":
        if self._writes:
            self._log = RunLog(self._folder, run_info(self._every, self._run), resume=True)
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()

    @property
    def next_step_is_logged(self) -> bool:
        """Whether the next step has a line."""
        return self._steps == 0 or (self._steps + 1) % self._every == 0

    def step(self, loss: Tensor | float, **metrics: float) -> None:
        """End one optimiser step, and write its line if it has one."""
        logged = self.next_step_is_logged
        self._steps += 1
        if not logged:
            return
        rates = [group["lr"] for optimizer in self._optimizers for group in optimizer.param_groups]
        self.last = {"step": self._steps, "loss": float(loss), "lr": rates, "alarms": [], "time": self._time()}
        self.last |= metrics
        if self._log is not None:
            self._log.write(self.last, {})

    def state_dict(self) -> dict[str, Any]:
        """What the next lines depend on."""
        return {"steps": self._steps, "time": self._time()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._steps, self._before, self._began = state["steps"], state["time"], time.perf_counter()

    def _time(self) -> float:
        return self._before + time.perf_counter() - self._began


class WorstHead:
    """A sink that remembers the name of the head with the lowest entropy."""

    name: str | None = None

    def write(self, line: Mapping[str, Any], readings: Mapping[Head, Reading]) -> None:
        """Look at the heads of a logged step."""
        seen = {head: reading.normalized for head, reading in readings.items() if not math.isnan(reading.normalized)}
        self.name = str(min(seen, key=lambda head: seen[head])) if seen else None

    def close(self) -> None:
        """There is nothing to close."""
