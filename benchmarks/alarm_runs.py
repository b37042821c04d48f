"""The runs on which alarms are calibrated: what is trained, and each run's log kept in a folder of its own.

Every arm is a way to train that somebody would choose, at learning rates from harmless to hopeless. Warmup
arms reach their learning rate well into the run, so that they fail, if they do, in the middle of it.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from small_tasks import TASKS, Setup, make

import trimtab as tt

LINES = 100  # logged lines in a run


@dataclass(frozen=True)
class Planned:
    """One run: what is trained, the peak learning rate, and the share of the run over which it is warmed up."""

    setup: Setup
    lr: float
    warmup: float = 0.0

    def __str__(self) -> str:
        setup = self.setup
        words = [setup.task, f"{setup.norm}-LN", setup.stabilizer]
        words += [f"std{setup.init_std:g}"] if setup.init_std else []
        words += [f"depth{setup.depth}"] if setup.depth else []
        words += [f"warmup{self.warmup:g}"] if self.warmup else []
        return "_".join([*words, f"lr{self.lr:g}", f"seed{setup.seed}"])


def planned(seeds: int) -> Iterator[Planned]:
    """Every run, seed by seed, so that a part of them is a table too."""
    for seed in range(seeds):
        for setup, lrs, warmup in _arms():
            for lr in lrs:
                yield Planned(replace(setup, seed=seed), lr, warmup)


def _arms() -> Iterator[tuple[Setup, tuple[float, ...], float]]:
    for task in ("digits", "shakespeare"):
        yield Setup(task), (1e-3, 1e-2, 3e-2, 1e-1), 0.0
        yield Setup(task), (3e-2, 1e-1), 0.5
        yield Setup(task), (1e-1, 3e-1), 0.2
        yield Setup(task, norm="post"), (3e-3, 3e-2), 0.0
        yield Setup(task, init_std=0.02), (1e-3, 3e-3), 0.0
        yield Setup(task, norm="none"), (3e-3, 1e-2, 3e-2), 0.0
        yield Setup(task, norm="none"), (3e-2,), 0.5
        yield Setup(task, norm="none", stabilizer="sigma", init_std=0.4), (1e-2, 3e-2, 1e-1), 0.0
    yield Setup("reverse"), (3e-3, 1e-2, 1e-1), 0.0
    yield Setup("reverse"), (1e-1,), 0.5
    yield Setup("reverse", depth=4), (3e-3, 3e-2, 1e-1), 0.0
    yield Setup("reverse", norm="post"), (3e-3, 1e-2), 0.0
    yield Setup("reverse", norm="post", depth=6), (1e-3,), 0.0
    yield Setup("reverse", norm="post", stabilizer="sigma", init_std=0.1), (3e-3, 1e-2, 1e-1), 0.0


def collect(run: Planned, folder: Path) -> None:
    """Train one run, watched; its folder appears when it is whole. A run that is there already is left alone."""
    target, aside = folder / str(run), folder / f"{run}.part"
    if target.exists():
        return
    shutil.rmtree(aside, ignore_errors=True)
    steps = TASKS[run.setup.task].steps
    warmup = round(run.warmup * steps)
    model, next_loss = make(run.setup)
    optimizer = torch.optim.AdamW(model.parameters(), run.lr, weight_decay=0.0, fused=True)
    with tt.Watch(model, aside, every=max(1, steps // LINES), run=facts(run), on_alarm=lambda alarm: None) as watch:
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = run.lr * min(1.0, step / warmup) if warmup else run.lr
            logged = watch.next_step_is_logged
            loss = next_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watch.step(loss)
            if logged and not math.isfinite(loss.item()):
                break
    aside.rename(target)


def facts(run: Planned) -> dict[str, object]:
    """What run.json says of a run."""
    return {"task": run.setup.task, "setup": asdict(run.setup), "peak_lr": run.lr, "warmup": run.warmup}


def losses(folder: Path) -> tuple[list[int], list[float]]:
    """Logged steps and their losses."""
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text(encoding="utf8").splitlines()]
    return [line["step"] for line in lines], [float(line["loss"]) for line in lines]
