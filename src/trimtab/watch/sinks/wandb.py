"""A sink for Weights & Biases."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from trimtab.watch.alarms import Head, Reading
from trimtab.watch.sinks.scalars import head_values, scalars

_PREFIX = "trimtab/"  # in a run that others log to as well, our names and our step axis are our own


class WandbSink:
    """Writes every logged line to a run of Weights & Biases: scalars, the heads as histograms, alarms as text.

        tt.Watch(model, "runs/gpt", sinks=[WandbSink("my-project", dir="runs")])

    Offline by default: nothing leaves the machine until you run `wandb sync`. For that the environment variable
    WANDB_ERROR_REPORTING is set to "false" for the whole process, unless it is set already; wandb has no other way to
    say it. The names are those of
    `trimtab.watch.sinks.scalars.scalars` after "trimtab/", drawn against "trimtab/step", so that they live beside
    whatever else the run logs. A new run is begun with the first line, so in a run of several processes by the one
    that writes.

    Args:
        project: the project of a new run.
        mode: "offline" (files only), "online" or "disabled".
        run: a run that is open already, to write to instead of a new one; it is left open.
        options: more arguments for `wandb.init`, such as `dir`, `name` or `config`.

    Raises:
        ModuleNotFoundError: the wandb package is not installed.
    """

    def __init__(
        self,
        project: str = "trimtab",
        mode: Literal["offline", "online", "disabled"] = "offline",
        *,
        run: Any = None,
        **options: Any,
    ) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            if error.name != "wandb":
                raise
            raise ModuleNotFoundError("WandbSink needs wandb: pip install 'trimtab[wandb]'", name="wandb") from error
        if run is None and mode == "offline":
            # wandb 0.31 sends figures about itself from offline runs too, unless its error reporting is off.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._histogram = wandb.Histogram
        self._begin = (lambda: wandb.init(project=project, mode=mode, **options)) if run is None else (lambda: run)
        self._owned = run is None
        self._run: Any = None

    def write(self, line: Mapping[str, Any], readings: Mapping[Head, Reading]) -> None:
        """Write one logged step."""
        if self._run is None:
            self._run = self._begin()
            self._run.define_metric(f"{_PREFIX}step", hidden=True)
            self._run.define_metric(f"{_PREFIX}*", step_metric=f"{_PREFIX}step")
        values: dict[str, Any] = {"step": line["step"], **scalars(line)}
        values.update((name, self._histogram(numbers)) for name, numbers in head_values(readings).items())
        if alarms := line.get("alarms"):
            values["alarm"] = "\n".join(alarm["message"] for alarm in alarms)
        self._run.log({_PREFIX + name: value for name, value in values.items()})

    def close(self) -> None:
        """End the run, if this sink began it."""
        if self._owned and self._run is not None:
            self._run.finish()
