"""A sink for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.watch.alarms import Head, Reading
from trimtab.watch.sinks.scalars import head_values, scalars


class TensorBoardSink:
    """Writes every logged line for TensorBoard: scalars, the heads as histograms, alarms as text.

        tt.Watch(model, "runs/gpt", sinks=[TensorBoardSink("runs/gpt/tensorboard")])

    Then `tensorboard --logdir runs`. The scalars' names are those of `trimtab.watch.sinks.scalars.scalars`.

    The event file is begun with the first line, so in a run of several processes by the one that writes.

    Args:
        folder: where the event file goes; made if it is not there.

    Raises:
        ModuleNotFoundError: the tensorboard package is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:  # torch's own message names no package to install
            message = "TensorBoardSink needs the tensorboard package: pip install 'trimtab[tensorboard]'"
            raise ModuleNotFoundError(message, name="tensorboard") from error
        self._begin = lambda: SummaryWriter(str(folder))
        self._writer: SummaryWriter | None = None

    def write(self, line: Mapping[str, Any], readings: Mapping[Head, Reading]) -> None:
        """Write one logged step, so that it can be looked at from then on."""
        if self._writer is None:
            self._writer = self._begin()
        step = line["step"]
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, step)
        for name, values in head_values(readings).items():
            self._writer.add_histogram(name, np.array(values), step)
        for alarm in line.get("alarms", ()):
            self._writer.add_text(f"alarms/{alarm['kind']}", alarm["message"], step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
