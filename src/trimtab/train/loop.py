"""The training loop: one recipe, one folder, on whatever hardware there is.

The order of things is what a newcomer would write by hand. Everything that decides a number comes from the recipe:
the same recipe gives the same numbers on the same machine, also when the run is interrupted and goes on.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from trimtab.errors import CheckpointError, RecipeError
from trimtab.stabilizers import stabilize_, with_changes
from trimtab.stabilizers.clipper import see_compiled_
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Examples, Task
from trimtab.train.average import Average
from trimtab.train.checkpoints import best_checkpoint, load_checkpoint, load_weights, save_checkpoint
from trimtab.train.clock import Clock
from trimtab.train.evaluate import evaluate
from trimtab.train.folder import open_folder, write_files
from trimtab.train.hardware import Hardware, distributed, launched
from trimtab.train.loader import Loader
from trimtab.train.log import PlainLog, WorstHead
from trimtab.train.memory import reset_peak_memory
from trimtab.train.order import derived_seed
from trimtab.train.outcome import (
    agree,
    elapsed,
    end_of,
    first_facts,
    is_better,
    note_metrics,
    note_times,
    progress_of,
    result_of,
)
from trimtab.train.progress import Progress, Result, write_result
from trimtab.train.randomness import numerics, seed_all
from trimtab.train.schedule import learning_rate_factor, set_learning_rates
from trimtab.train.signals import Interruption
from trimtab.train.state import TrainState
from trimtab.train.step import all_finite, scaler_of, step_function
from trimtab.watch import Watch
from trimtab.watch.reduce import Ranks

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger("trimtab")

OnStep = Callable[[Progress], None]


def train(
    recipe: Recipe,
    folder: str | Path,
    on_step: OnStep | None = None,
    *,
    hardware: Hardware = Hardware(),  # noqa: B008 - it is frozen
    facts: Mapping[str, Any] | None = None,
) -> Result:
    """Train a recipe's model, from the start or from where an earlier call was interrupted.

    A new or empty folder starts a run. One with the same recipe goes on from its newest whole checkpoint, to the very
    bits of a run that was never interrupted; or returns its result at once. Ctrl-C and SIGTERM let the step end, save
    and return.

    Args:
        recipe: what to train.
        folder: of the run: its log, checkpoints and result.
        on_step: called after every logged step, in the first process; it is then told of alarms, which are warnings
            of the logger "trimtab" otherwise. An exception it raises ends the run.
        hardware: where to train.
        facts: more for run.json: plain values.

    Returns:
        How the run ended, in every process. A run that diverges is a result, not an error.

    Raises:
        RunFolderError: the folder holds another run (the first field that differs is named) or something else.
        CheckpointError: the run cannot go on from its checkpoint.
        RecipeError: parts of the recipe do not fit together, or not this hardware.
        ConversionError: the model has nothing of what a stabilizer changes.
        DataError: the data cannot be loaded.
    """
    used = with_changes(recipe, recipe.stabilizer)
    with launched(hardware, used.precision) as fabric, ExitStack() as whole_run:
        run = _description(recipe, fabric, hardware) | dict(facts or {})
        found = whole_run.enter_context(open_folder(Path(folder), run))
        if found.result is not None:
            return found.result
        interruption = whole_run.enter_context(Interruption(1.0 if fabric.world_size > 1 else 0.0))
        whole_run.enter_context(numerics(used.seed, fabric.device))
        task = used.task()
        check_fit(used, task, fabric.world_size)
        stabilize_(task.model, used.stabilizer, changes_made=True)
        run |= task.facts
        write_files(Path(folder), task.files)
        run["parameters"] = sum(parameter.numel() for parameter in task.model.parameters())
        # Dropout and the like begin the same whatever a stabilizer drew, and differently in each process.
        seed_all(derived_seed("training", used.seed, fabric.global_rank))
        return _run(used, task, Path(folder), found.checkpoint, fabric, interruption, on_step, run)


def _run(
    recipe: Recipe,
    task: Task,
    folder: Path,
    checkpoint: Path | None,
    fabric: "Fabric",
    interruption: Interruption,
    on_step: OnStep | None,
    info: Mapping[str, Any],
) -> Result:
    """Train a task until its end, or until it is interrupted."""
    reset_peak_memory(fabric.device)
    model = distributed(fabric, task.model, compiled=recipe.compile)
    see_compiled_(task.model)
    optimizers = recipe.optimizers(task.model)
    average = Average(task.model, recipe.ema) if recipe.ema is not None else None
    take_step = step_function(fabric, model, task, optimizers, recipe)
    loader = Loader(task.train, recipe, fabric)
    clock = Clock(fabric.device)
    worst = WorstHead()

    def measure(examples: Examples | None) -> dict[str, float]:
        if examples is None:
            return {}
        with average.applied(task.model) if average is not None else nullcontext():
            return evaluate(fabric, model, task, examples, recipe)

    def told(test: dict[str, float]) -> Result:
        assert status is not None
        return result_of(folder, status, recipe, task, state, test, fabric.device, loader.examples_in_step)

    with _log(recipe, task, optimizers, folder, fabric, info, worst, quiet=on_step is not None) as watch:
        state = TrainState(task.model, optimizers, average, scaler_of(fabric), watch)
        if checkpoint is None:
            state.facts = first_facts(measure(task.evaluation))
        else:
            load_checkpoint(checkpoint, state)
            clock.before = state.facts["seconds"]

        broken = torch.zeros((), dtype=torch.bool, device=fabric.device)  # read seldom: a GPU would be waited for
        status, seconds = end_of(recipe, state), elapsed(recipe, clock, fabric)
        with closing(loader.batches(state.step + 1)) as batches:
            while status is None:
                step, logged = state.step + 1, watch.next_step_is_logged
                clock.step_begins(logged)
                set_learning_rates(optimizers, learning_rate_factor(recipe, step, seconds))
                loss = take_step(next(batches))
                broken.logical_or_(~loss.isfinite())
                if average is not None:
                    average.update_()
                state.step, seconds = step, elapsed(recipe, clock, fabric)

                ends = step == recipe.steps or (recipe.seconds is not None and seconds >= recipe.seconds)
                saves = ends or step % recipe.checkpoint_every == 0
                if not (logged or saves or (fabric.world_size == 1 and interruption.asked)):
                    watch.step(loss)
                    continue

                clock.pause(logged)
                facts = state.facts
                broken.logical_or_(~all_finite(task.model))  # a loss can be finite and its gradient not
                facts["loss"], diverged, interrupted = agree(fabric, loss, broken, interruption.asked)
                facts["diverged"] = diverged and (logged or ends)  # it shows in the next line of the log
                note_times(facts, clock, loader, seconds)
                status = end_of(recipe, state)
                metrics: dict[str, float] = {}
                if task.evaluation is not None and (status is not None or step % recipe.eval_every == 0):
                    metrics = measure(task.evaluation)
                    note_metrics(facts, metrics, task, step)
                    status = end_of(recipe, state)
                watch.step(facts["loss"], **(metrics if logged else {}))
                if logged and on_step is not None and fabric.is_global_zero:
                    on_step(progress_of(recipe, state, clock, worst.name, loader.examples_in_step))
                if status is None and interrupted:
                    status = "interrupted"
                better = facts["best_step"] == step
                if not diverged and (saves or status is not None or (better and recipe.patience is not None)):
                    _save(folder, state, recipe.keep, metrics, task)

        if status == "interrupted":
            return told({})
        if recipe.patience is not None and state.facts["best"]:
            _load_best(folder, task, average)
            state.facts["metrics"] = measure(task.evaluation)
        test = measure(task.test)
        state.facts["seconds"] = clock.seconds()
        result = Ranks().gather(told(test))[0]
    Ranks().first_does(lambda: write_result(result))
    return result


def _save(folder: Path, state: TrainState, keep: int, metrics: dict[str, float], task: Task) -> None:
    """Save a checkpoint; a disk that is full is no reason to stop: there is the one before."""
    before = state.facts["best_saved"]
    best = is_better(metrics, before, task)
    if best:
        state.facts["best_saved"] = metrics
    try:
        save_checkpoint(folder, state, keep=keep, best=best)
    except CheckpointError as error:
        state.facts["best_saved"] = before
        if Ranks().first:
            logger.warning("no checkpoint was saved at step %d; training goes on. %s", state.step, error)


def _load_best(folder: Path, task: Task, average: Average | None) -> None:
    best = best_checkpoint(folder)
    if best is not None:
        load_weights(best, task.model, average)
    elif Ranks().first:
        logger.warning("no whole checkpoint of the best weights is left in %s: the last weights count", folder)


def _log(
    recipe: Recipe,
    task: Task,
    optimizers: Sequence[Optimizer],
    folder: Path,
    fabric: "Fabric",
    info: Mapping[str, Any],
    worst: WorstHead,
    quiet: bool,
) -> Watch | PlainLog:
    """What looks on and writes the log; `quiet` leaves alarms to `Progress.alarms`."""
    if not recipe.watch:
        return PlainLog(optimizers, folder, recipe.watch_every, info, fabric.is_global_zero)
    on_alarm = _ignore if quiet else None
    return Watch(task.model, folder, recipe.watch_every, run=info, on_alarm=on_alarm, sinks=[worst], resume=True)


def _ignore(_: object) -> None:
    """Leave an alarm to `Progress.alarms` and the run log."""


def _description(recipe: Recipe, fabric: "Fabric", hardware: Hardware) -> dict[str, Any]:
    """What run.json says about the run, beside what Watch knows by itself and the number of parameters."""
    return {
        "task": type(recipe).__name__,
        "recipe": asdict(recipe),
        "seed": recipe.seed,
        "accelerator": fabric.device.type,
        "strategy": hardware.strategy,
        "processes": fabric.world_size,
    }


def check_fit(recipe: Recipe, task: Task, processes: int = 1) -> None:
    """Refuse what does not fit together.

    Raises:
        RecipeError: the task is none, or too small for the recipe.
    """
    if not isinstance(task, Task):
        raise RecipeError(f"{type(recipe).__name__}.task must return a Task, it returned {type(task).__name__}")
    if recipe.batch_tokens is None:  # or else the loader knows
        _check_batch_size(recipe, task, processes)
    if recipe.patience is not None and task.evaluation is None:
        raise RecipeError("patience needs examples to evaluate on, and the task has none: give it `evaluation`")


def _check_batch_size(recipe: Recipe, task: Task, processes: int) -> None:
    if recipe.batch_size > task.train.size:
        raise RecipeError(f"batch_size {recipe.batch_size} is larger than the {task.train.size:,} training examples")
    if recipe.batch_size % (recipe.accumulate * processes):
        raise RecipeError(
            f"batch_size must be a multiple of {recipe.accumulate} micro-batches × {processes} processes, "
            f"got {recipe.batch_size}"
        )
