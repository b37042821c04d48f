"""How long a run and its steps take."""

import statistics
import time
from collections import deque

import torch


class Clock:
    """Measures steps in stretches between two logged steps, so that a GPU is waited for at their ends only.

    Args:
        device: what the steps run on.

    Attributes:
        before: seconds that other processes have worked on the run.
    """

    def __init__(self, device: torch.device) -> None:
        self.before = 0.0
        self._device = device
        self._began = time.perf_counter()
        self._since: float | None = None
        self._count = 0
        self._plain: deque[float] = deque(maxlen=1000)
        self._logged: deque[float] = deque(maxlen=1000)

    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.before + time.perf_counter() - self._began

    def step_begins(self, logged: bool) -> None:
        """Call it before every step. A logged one, which is looked at and so slower, is a stretch of its own."""
        if logged:
            self.pause()
        if self._since is None:
            self._since = time.perf_counter()
        self._count += 1

    def pause(self, logged: bool = False) -> None:
        """Call it before anything that is no part of a step: an evaluation, a line of the log, a checkpoint."""
        if self._since is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        stretch = time.perf_counter() - self._since
        (self._logged if logged else self._plain).append(stretch / self._count)
        self._since, self._count = None, 0

    @property
    def step_seconds(self) -> float:
        """The median time of a step; of the logged ones where there are no others; NaN before the first."""
        return statistics.median(self._plain or self._logged or [float("nan")])

    @property
    def lately(self) -> float:
        """The time of a step in the last stretch."""
        return (self._plain or self._logged or [float("nan")])[-1]
