"""`Watch`: see a model train, write a run log, raise alarms; change nothing."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from trimtab.reparam import sigma_error, sigma_gamma
from trimtab.watch.alarms import Alarm, CollapseAlarm, Head, Reading
from trimtab.watch.runlog import RunLog, refuse_used, run_info
from trimtab.watch.signals import HeadStats, plain_sigmas
from trimtab.watch.taps import AttentionTap, OptimizerTap

logger = logging.getLogger("trimtab")

_watched: WeakSet[nn.Module] = WeakSet()

# What a line of the log holds by itself, in its order; metrics take other names and follow.
_OWN_NAMES = (
    *("step", "loss", "lr", "grad_norm", "entropy_min", "entropy_mean", "max_logit"),
    *("sigma", "gamma", "sigma_error", "alarms", "time"),
)


class Watch:
    """Watches a model train, as a context manager: one call per optimiser step, everything else by itself.

        with tt.Watch(model, "runs/vit", every=20) as watch:
            for batch in loader:
                ...                             # forward, backward, optimizer.step()
                watch.step(loss)

    Step n (counted from 1) is logged when it is the first or a multiple of `every`. Logged are loss, learning
    rate, gradient norm, attention entropy and largest logit of every head, and the spectral norm sigma of every
    weight (where it is converted: the sigma in use, gamma, and the error ``true sigma / sigma in use - 1``).
    Training is not changed: the weights end bit-identical to those of an unwatched run, and steps that are not
    logged cost next to nothing.

    What is seen: attention that goes through `scaled_dot_product_attention` in forwards of `model` itself, in
    training mode and eager; optimisers that derive from `torch.optim.Optimizer`. The rest is absent from the log,
    and the first logged step says so. Several forwards before one `step` (gradient accumulation) are averaged.
    Watches one process; with several, give each a folder of its own.

    Args:
        model: any model.
        folder: where the run is written: a new folder, or one without a run in it.
        every: steps from one logged step to the next.
        run: facts for run.json: recipe, seeds and the like; plain values.
        collapse_threshold: normalised entropy (0 to 1) below which a head raises the alarm "entropy collapse"
            when it stays there for two logged steps; 0 switches the alarm off.
        on_alarm: called with each `Alarm`; by default its message is logged as a warning of logger "trimtab".

    Attributes:
        alarms: every `Alarm` so far, oldest first.
        last: the last logged line, with numbers as floats; empty before the first.
        unseen: why the attention of a module, by dotted name, could not be seen; empty when all was well.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, or (on entering) a model that is being watched already.
        RunFolderError: the folder already holds a run, or (on entering) cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path,
        every: int = 20,
        *,
        run: Mapping[str, Any] | None = None,
        collapse_threshold: float = 0.03,
        on_alarm: Callable[[Alarm], object] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"expected every to be a whole number of steps, got {every!r}")
        if every < 1:
            raise ValueError(f"expected every >= 1 (steps from one logged step to the next), got {every}")
        if not 0 <= collapse_threshold < 1:
            raise ValueError(f"expected 0 <= collapse_threshold < 1, got {collapse_threshold}")
        self.alarms: list[Alarm] = []
        self.last: dict[str, Any] = {}
        self.unseen: dict[str, str] = {}
        self._model, self._folder, self._every = model, Path(folder), every
        self._run, self._on_alarm = run, on_alarm
        self._collapse = CollapseAlarm(collapse_threshold)
        self._steps = 0
        self._starts: dict[str, Tensor] = {}
        self._open = ExitStack()
        self._log: RunLog | None = None  # there while the watch is open
        run_info(every, run)  # refuses what cannot be written
        refuse_used(self._folder)

    @property
    def next_step_is_logged(self) -> bool:
        """Whether the step that the next call of `step` ends will be logged."""
        return self._steps == 0 or (self._steps + 1) % self._every == 0

    def __enter__(self) -> "Watch":
        if self._model in _watched:
            raise ValueError("this model is being watched already: leave the other Watch before entering this one")
        self._log = RunLog(self._folder, run_info(self._every, self._run))
        self._open.callback(self._log.close)
        self._attention = AttentionTap(self._model, lambda: self.next_step_is_logged)
        self._open.callback(self._attention.close)
        self._optimizer = OptimizerTap(self._model, lambda: self.next_step_is_logged)
        self._open.callback(self._optimizer.close)
        _watched.add(self._model)
        self._open.callback(_watched.discard, self._model)
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log = None
        self._open.close()

    def step(self, loss: Tensor | float, **metrics: float) -> None:
        """End one optimiser step; call it after `optimizer.step()`.

        Args:
            loss: the step's loss, a number or a tensor of one element, which is read on logging steps only.
            metrics: more numbers for this line of the log; only where `next_step_is_logged` was True.

        Raises:
            RuntimeError: the watch is not open.
            TypeError: a loss or metric that is no number.
            ValueError: a loss of several elements, metrics on a step that is not logged, or a metric with the name
                of a quantity that Watch logs itself.
        """
        if self._log is None:
            raise RuntimeError("watch.step was called outside its with block: use `with tt.Watch(...) as watch:`")
        self._check(loss, metrics)
        logged = self.next_step_is_logged
        if logged:
            readings = _readings(self._attention.take())
            self.unseen = dict(self._attention.unseen)
            line = self._line(_number(loss), readings)
            alarms = self._collapse.check(line["step"], line["loss"], readings)
            line["alarms"] = [asdict(alarm) for alarm in alarms]
            line["time"] = time.perf_counter() - self._began
            line.update((name, _number(value)) for name, value in metrics.items())
            if self._steps == 0:
                self._note_what_is_unseen(bool(readings))
        self._steps += 1
        if logged:
            self._log.write(line, readings)
            self.last = line
            self.alarms += alarms
            for alarm in alarms:
                self._raise(alarm)

    def _line(self, loss: float, readings: Mapping[Head, Reading]) -> dict[str, Any]:
        """The line of this step; what was not seen is absent."""
        line: dict[str, Any] = {"step": self._steps + 1, "loss": loss}
        optimizer = self._optimizer.take()
        if optimizer is not None:
            line["lr"] = optimizer.lr
            if optimizer.grad_norm is not None:
                line["grad_norm"] = optimizer.grad_norm
        if readings:
            # Of heads without a number (no query has a choice, or NaN) there is no minimum; the logits show NaN.
            normalized = [reading.normalized for reading in readings.values() if reading.normalized >= 0]
            logits = [reading.max_logit for reading in readings.values()]
            line["entropy_min"] = min(normalized, default=math.nan)
            line["entropy_mean"] = sum(reading.entropy for reading in readings.values()) / len(readings)
            line["max_logit"] = math.nan if any(map(math.isnan, logits)) else max(logits)
        converted = sigma_gamma(self._model)
        sigma = {name: sigmas.tolist() for name, (sigmas, _) in converted.items()}
        sigma |= plain_sigmas(self._model, converted, self._starts)
        if sigma:
            line["sigma"] = sigma
        if converted:
            line["gamma"] = {name: gammas.tolist() for name, (_, gammas) in converted.items()}
            line["sigma_error"] = {name: errors.tolist() for name, errors in sigma_error(self._model).items()}
        return line

    def _check(self, loss: object, metrics: Mapping[str, object]) -> None:
        _check_number("loss", loss)
        if metrics and not self.next_step_is_logged:
            raise ValueError(
                f"step {self._steps + 1} is not logged, so its metrics ({', '.join(metrics)}) would be lost: "
                "pass them only where watch.next_step_is_logged was True"
            )
        for name, value in metrics.items():
            if name in _OWN_NAMES:
                raise ValueError(f"the log has a {name!r} of its own: give the metric another name")
            _check_number(name, value)

    def _note_what_is_unseen(self, attention_seen: bool) -> None:
        if self.unseen:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.unseen.items())
            logger.warning("some attention cannot be watched (%s)", reasons)
        elif not attention_seen:
            logger.warning(
                "no attention was seen in the first step, so the log has none. Watch sees "
                "torch.nn.functional.scaled_dot_product_attention inside calls of the watched model, eager and in "
                "training mode: is it this model that is called, is model.train() on, is it not compiled?"
            )

    def _raise(self, alarm: Alarm) -> None:
        if self._on_alarm is None:
            logger.warning(alarm.message)
        else:
            self._on_alarm(alarm)


def _readings(stats: Mapping[str, HeadStats]) -> dict[Head, Reading]:
    """One reading per head, in the order of the forward."""
    return {
        Head(name, head): Reading(*numbers)
        for name, heads in stats.items()
        for head, numbers in enumerate(zip(*(values.tolist() for values in heads), strict=True))
    }


def _check_number(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"expected {name} to be one number, got a tensor of shape {tuple(value.shape)}")
    elif not isinstance(value, Real):
        raise TypeError(f"expected {name} to be a number or a tensor of one, got {type(value).__name__}")


def _number(value: Tensor | float) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)
