"""`Watch`: see a model train, write a run log, raise alarms; change nothing."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from trimtab.watch.alarms import Alarm, Alarms, Head, Reading, Thresholds
from trimtab.watch.checks import check_cadence, check_kinds, check_number, number
from trimtab.watch.coverage import Coverage
from trimtab.watch.instruments import Instruments
from trimtab.watch.reduce import Ranks, Sight, of_all_heads
from trimtab.watch.runlog import RunLog, refuse_used, run_info
from trimtab.watch.signals import GradientNoise, Sharpness, averaged, sharpness
from trimtab.watch.taps.gradients import noise_of

logger = logging.getLogger("trimtab")

_watched: WeakSet[nn.Module] = WeakSet()

# What a line of the log holds by itself, in its order; metrics take other names and follow.
_OWN_NAMES = (
    *("step", "loss", "lr", "grad_norm"),
    *("entropy_min", "entropy_mean", "entropy_bound", "max_logit", "logit_norm"),
    *("sigma", "gamma", "stable_rank", "grad_variance", "update_ratio", "tev", "activation_rms", "output_z"),
    *("sigma_error", "qk_energy", "grad_noise", "sharpness"),
    *("alarms", "time"),
)

# The slow signals cost some passes over the model: not oftener than this by default.
_SLOW_STEPS = 200


class Sink(Protocol):
    """Somewhere else for the log to go: each logged line, with its alarms, and the heads it was made from."""

    def write(self, line: Mapping[str, Any], readings: Mapping[Head, Reading]) -> None:
        """Take in one logged step."""

    def close(self) -> None:
        """The run is over."""


class Watch:
    """Watches a model train, as a context manager: one call per optimiser step, everything else by itself.

        with tt.Watch(model, "runs/vit", every=20) as watch:
            for batch in loader:
                ...                             # forward, backward, optimizer.step()
                watch.step(loss)

    Step n (counted from 1) is logged when it is the first or a multiple of `every`; docs/signals.md tells what is
    logged, docs/coverage.md whose attention is seen, `coverage()` what was seen of this model. Training is not
    changed: the weights end bit-identical to those of an unwatched run, and steps that are not logged cost next to
    nothing. Several forwards before one `step` (gradient accumulation) are averaged.

    With several processes each of them makes a Watch, with the same arguments, and calls `step`: what they saw is
    averaged (largest logits are maxed), the first of them writes, and all of them raise the same alarms.

    Args:
        model: any model.
        folder: where the run is written: a new folder, or one without a run in it.
        every: steps from one logged step to the next.
        slow_every: the same for signals that cost more (sigma_error, qk_energy, grad_noise, an exact sigma): a
            multiple of `every`; by default the first one that is at least 200 and at least ten times `every`.
        run: facts for run.json: recipe, seeds and the like; plain values.
        thresholds: when alarms are raised.
        on_alarm: called with each `Alarm`, on every process; by default its message is logged as a warning of
            logger "trimtab", on the first. An exception that it raises goes through `step`: a way to stop a run.
        sinks: where else the log goes (TensorBoard, Weights & Biases ...), closed when the watch ends. One that raises
            gets nothing more.
        process_group: of torch.distributed, the processes that watch together; the default group by default. Under
            tensor or pipeline parallelism, where the same head number is another head elsewhere, pass the group of
            data parallelism, and give each of these groups a folder of its own. On GPUs let each process choose its
            device first (torch.cuda.set_device).
        resume: whether the folder may hold a run, which this one continues: its lines stay and none is written twice.
            Give the watch what `state_dict` returned at the checkpoint, with `load_state_dict`, after entering it.

    Attributes:
        alarms: every `Alarm` so far, oldest first.
        last: the last logged line, with numbers as floats; empty before the first.

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
        slow_every: int | None = None,
        run: Mapping[str, Any] | None = None,
        thresholds: Thresholds | None = None,
        on_alarm: Callable[[Alarm], object] | None = None,
        sinks: Sequence[Sink] = (),
        process_group: Any = None,
        resume: bool = False,
    ) -> None:
        check_kinds(model, folder, run, on_alarm, thresholds, sinks)
        check_cadence("every", every)
        if slow_every is None:
            slow_every = every * max(10, math.ceil(_SLOW_STEPS / every))
        check_cadence("slow_every", slow_every)
        if slow_every % every:
            raise ValueError(f"expected slow_every to be a multiple of every={every}, got {slow_every}")
        self.alarms: list[Alarm] = []
        self.last: dict[str, Any] = {}
        self._model, self._folder, self._every, self._slow_every = model, Path(folder), every, slow_every
        self._run, self._on_alarm, self._group, self._resume = run, on_alarm, process_group, resume
        self._sinks = list(sinks)
        self._decide = Alarms(thresholds)
        self._steps = 0
        self._noise: GradientNoise | None = None
        self._sharpness: Sharpness | None = None
        self._open = ExitStack()
        self._instruments: Instruments | None = None  # there from entering on
        self._log: RunLog | None = None  # there while the watch is open, in the process that writes
        self._is_open = False
        self._measuring = False  # forwards of our own are none of training's
        self._info()  # refuses what cannot be written
        if not resume and Ranks(process_group).size == 1:  # of several, one may have begun to write already
            refuse_used(self._folder)

    @property
    def next_step_is_logged(self) -> bool:
        """Whether the step that the next call of `step` ends will be logged."""
        return self._steps == 0 or (self._steps + 1) % self._every == 0

    def __enter__(self) -> "Watch":
        inner = _unwrapped(self._model)
        if inner in _watched:
            raise ValueError("this model is being watched already: leave the other Watch before entering this one")
        self._ranks = Ranks(self._group)
        try:
            self._ranks.first_does(self._open_log)
            self._instruments = Instruments(
                self._model,
                lambda: self.next_step_is_logged and not self._measuring,
                lambda: self._next_step_is_slow and not self._measuring,
            )
        except BaseException:
            self._open.close()
            raise
        self._open.callback(self._instruments.close)
        _watched.add(inner)
        self._open.callback(_watched.discard, inner)
        self._began = time.perf_counter()
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
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
        instruments = self._instruments
        if instruments is None or not self._is_open:
            raise RuntimeError("watch.step was called outside its with block: use `with tt.Watch(...) as watch:`")
        self._check(loss, metrics)
        if not self.next_step_is_logged:
            self._steps += 1
            return
        seen = instruments.take(self._next_step_is_slow)
        numbers: dict[str, Any] = {name: number(value) for name, value in metrics.items()}
        if self._sharpness is not None:
            numbers["sharpness"] = _without_none(self._sharpness._asdict())
            self._sharpness = None
        seen.line.update(numbers, loss=number(loss))
        sight = self._ranks.together(seen)
        if self._steps == 0 and self._ranks.first:
            self._note_what_is_unseen(sight)
        line = self._line(sight)
        alarms = self._decide.check(line["step"], line, sight.readings)
        line |= {"alarms": [asdict(alarm) for alarm in alarms], "time": time.perf_counter() - self._began}
        line |= {name: sight.line[name] for name in sight.line if name not in _OWN_NAMES}
        self._steps += 1
        if self._log is not None and self._log.write(line, sight.readings):
            self._write_to_sinks(line, sight.readings)
        self.last = line
        self.alarms += alarms
        for alarm in alarms:
            self._raise(alarm)

    def attention(self, query: Tensor, key: Tensor, *, name: str | None = None, **options: Any) -> None:
        """See attention that a model computes by hand; call it where the logits would be computed.

        It costs a call unless the forward going on is one of those that will be logged.

        Args:
            query: (B..., H, L, D).
            key: (B..., H, S, D).
            name: under which its heads are reported; by default that of the module that is running.
            options: masks and the like, as for `trimtab.attention_stats`.

        Raises:
            TypeError: something that should be a tensor is not.
            ValueError: shapes or options that do not fit together.
        """
        if self._instruments is not None and self._is_open:
            self._instruments.attention.record(query, key, name=name, **options)

    def coverage(self) -> Coverage:
        """What attention was seen so far, what was not, and why: ``print(watch.coverage())``.

        Raises:
            RuntimeError: the watch was never entered.
        """
        if self._instruments is None:
            raise RuntimeError("nothing was seen yet: ask for coverage() inside or after the with block")
        return self._instruments.attention.coverage()

    def sharpness(
        self, closure: Callable[[], Tensor], *, optimizer: Optimizer | None = None, **options: Any
    ) -> Sharpness:
        """Measure the sharpness of the loss now, and put it into the next logged line. Training is not changed.

        Args:
            closure: returns the loss of one batch, without calling backward.
            optimizer: whose stability limits, and whose preconditioner, are wanted.
            options: iterations, tolerance and seed of `trimtab.sharpness`.

        Raises:
            TypeError: the closure returns no tensor.
            ValueError: as `trimtab.sharpness`.
        """
        self._measuring = True
        try:
            found = sharpness(closure, self._model.parameters(), optimizer=optimizer, model=self._model, **options)
        finally:
            self._measuring = False
        self._sharpness = found
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that later lines and alarms depend on: plain values and tensors, the same on every process.

        Raises:
            RuntimeError: the watch is not open.
        """
        instruments = self._entered()
        return {
            "steps": self._steps,
            "time": time.perf_counter() - self._began,
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "last": self.last,
            "decide": self._decide.state(),
            "noise": None if self._noise is None else self._noise._asdict(),
            "sharpness": None if self._sharpness is None else self._sharpness._asdict(),
            "instruments": instruments.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, as if there had been no break; times go on from there, too.

        Raises:
            RuntimeError: the watch is not open.
        """
        self._entered().load_state_dict(state["instruments"])
        self._steps, self.last = state["steps"], dict(state["last"])
        self._began = time.perf_counter() - state["time"]
        self.alarms[:] = [Alarm(**alarm) for alarm in state["alarms"]]
        self._decide.load(state["decide"])
        self._noise = None if state["noise"] is None else GradientNoise(**state["noise"])
        self._sharpness = None if state["sharpness"] is None else Sharpness(**state["sharpness"])

    def _entered(self) -> Instruments:
        if self._instruments is None or not self._is_open:
            raise RuntimeError("the state of a watch is that of an open one: use it inside its with block")
        return self._instruments

    @property
    def _next_step_is_slow(self) -> bool:
        return self._steps == 0 or (self._steps + 1) % self._slow_every == 0

    def _info(self) -> dict[str, Any]:
        return run_info(self._every, self._run)

    def _open_log(self) -> None:
        self._log = RunLog(self._folder, self._info(), resume=self._resume)
        self._open.callback(self._log.close)
        self._open.callback(self._close_sinks)

    def _line(self, sight: Sight) -> dict[str, Any]:
        """The line of this step in its order, with the numbers that all heads make together."""
        found: dict[str, Any] = {**sight.line, **of_all_heads(sight.readings)}
        noise = noise_of(sight.micro_batches)
        if noise is not None:
            self._noise = averaged(self._noise, noise)
            found["grad_noise"] = {**self._noise._asdict(), "scale": self._noise.scale}
        line = {"step": self._steps + 1}
        return line | {name: found[name] for name in _OWN_NAMES if name in found}

    def _check(self, loss: object, metrics: Mapping[str, object]) -> None:
        check_number("loss", loss)
        if metrics and not self.next_step_is_logged:
            raise ValueError(
                f"step {self._steps + 1} is not logged, so its metrics ({', '.join(metrics)}) would be lost: "
                "pass them only where watch.next_step_is_logged was True"
            )
        for name, value in metrics.items():
            if name in _OWN_NAMES:
                raise ValueError(f"the log has a {name!r} of its own: give the metric another name")
            check_number(name, value)

    def _note_what_is_unseen(self, sight: Sight) -> None:
        if "lr" not in sight.line:
            logger.warning(
                "no optimiser step was seen before the first watch.step, so its line has no learning rate, gradient "
                "norm or update_ratio. Unless a GradScaler skipped it, call watch.step after the optimizer.step() of a "
                "torch.optim optimiser"
            )
        unseen = self.coverage().unseen
        if not sight.readings and getattr(_unwrapped(self._model), "attends", True):
            logger.warning(
                "no attention was seen in the first step, so the log has none: is it this model that is called, and "
                "does it attend? Attention written by hand is seen through watch.attention(query, key)%s",
                _reasons(unseen),
            )
        elif unseen:
            logger.warning("some attention is not watched%s", _reasons(unseen))

    def _write_to_sinks(self, line: Mapping[str, Any], readings: Mapping[Head, Reading]) -> None:
        for sink in list(self._sinks):
            try:
                sink.write(dict(line), readings)
            except Exception as error:
                self._sinks.remove(sink)
                self._close_sink(sink)
                logger.warning(
                    "%s gets nothing from step %s on: %s. Training goes on.", type(sink).__name__, line["step"], error
                )

    def _close_sinks(self) -> None:
        for sink in self._sinks:
            self._close_sink(sink)

    def _close_sink(self, sink: Sink) -> None:
        try:
            sink.close()
        except Exception as error:
            logger.warning("%s could not be closed: %s", type(sink).__name__, error)

    def _raise(self, alarm: Alarm) -> None:
        if self._on_alarm is not None:
            self._on_alarm(alarm)
        elif self._ranks.first:
            logger.warning(alarm.message)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what distributes or compiles it."""
    if type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        return _unwrapped(model.module)  # type: ignore[arg-type]
    compiled = model._modules.get("_orig_mod")
    return model if compiled is None else _unwrapped(compiled)


def _reasons(unseen: Mapping[str, str]) -> str:
    return f" ({'; '.join(f'{name}: {reason}' for name, reason in unseen.items())})" if unseen else ""


def _without_none(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None}
