"""Kill a run with SIGKILL again and again, go on each time by the same call, and compare it with one that never was.

    python benchmarks/kill_resume.py            # about 10 minutes on 2 cores
    python benchmarks/kill_resume.py --quick    # does it run?

A small ViT on the digits with all that a step can depend on: dropout, noise in the data, sigma-Reparam, AdamW with a
cosine schedule and warmup, clipping, accumulation, a moving average, Watch. In one process, in two (DDP) and in two
that share the weights (FSDP2), all killed at once. Twenty kills each: one inside the write of a
checkpoint, which is held there until the signal comes; the others at moments drawn from a seed, so much after so many
logged steps, those before the first step included. Compared, byte by byte: weights, moving average, state of the
optimiser, random number generators and what Watch remembers, from the last checkpoint; every line of the log without
its time; the arrays of the heads; the result without its times.

Writes results/kill_resume.json, after each case.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.models.vit import ViTConfig
from trimtab.tasks.images.recipes import ImagesRecipe
from trimtab.tasks.task import Examples, Task
from trimtab.train import Hardware, train
from trimtab.train.checkpoints import files as checkpoint_files

STRATEGIES = {"1 process": (1, "auto"), "2 processes, DDP": (2, "ddp"), "2 processes, FSDP2": (2, "fsdp")}
TIMES = ("seconds", "step_seconds", "samples_per_second", "loader_samples_per_second", "peak_memory_bytes")


class Dropped(nn.Module):
    """A model behind dropout."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.dropout, self.inner = nn.Dropout(0.1), inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(self.dropout(images))


@dataclass(frozen=True, kw_only=True)
class Noisy(ImagesRecipe):
    """The digits, with noise and dropout."""

    def task(self) -> Task:
        task = super().task()
        plain = task.train.batch

        def noisy(indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            images, labels = plain(indices, generator)
            return images + 0.1 * torch.randn(images.shape, generator=generator), labels

        return replace(task, model=Dropped(task.model), train=Examples(task.train.size, noisy))


def recipe(steps: int) -> Noisy:
    return Noisy(
        data="digits",
        model=ViTConfig(image_size=8, patch_size=2, in_channels=1, num_classes=10, dim=32, depth=2, num_heads=2),
        stabilizer="sigma",
        schedule="cosine",
        warmup_steps=5,
        lr=3e-3,
        clip=1.0,
        steps=steps,
        batch_size=32,
        accumulate=2,
        ema=0.9,
        watch_every=3,
        eval_every=12,
        checkpoint_every=5,
    )


def child(folder: Path, strategy: Any, steps: int, hold: Path | None) -> None:
    """Train, and say each logged step. With `hold`, stop inside the write of the second checkpoint until killed."""
    torch.set_num_threads(1)
    if hold is not None:
        sync, writes = checkpoint_files.sync, []

        def held(path: Path) -> None:
            writes.append(path)
            if sum(path.name == "state.json" for path in writes) == 2:
                hold.write_text(path.parent.name)
                time.sleep(3600)
            sync(path)

        checkpoint_files.sync = held

    def say(progress: Any) -> None:
        print("step", progress.step, flush=True)

    train(recipe(steps), folder, say, hardware=Hardware(accelerator="cpu", strategy=strategy))


class Started:
    """The processes of one run, started by the same command every time; two as torchrun starts them."""

    def __init__(self, folder: Path, case: str, steps: int, hold: Path | None = None) -> None:
        count, strategy = STRATEGIES[case]
        command = [sys.executable, __file__, "--child", str(folder), "--strategy", strategy, "--steps", str(steps)]
        if hold is not None:
            command += ["--hold", str(hold)]
        self.log = folder.with_name(folder.name + ".log")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if count > 1:
            common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "kill"}
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = []
        with self.log.open("a") as log:
            for rank in map(str, range(count)):
                own = {"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
                out = subprocess.PIPE if rank == "0" else subprocess.DEVNULL
                environment = os.environ | common | own
                self.processes.append(subprocess.Popen(command, stdout=out, stderr=log, text=True, env=environment))
        self.said = self.processes[0].stdout

    def ended(self) -> bool:
        """Whether it has come to its end by itself.

        Raises:
            RuntimeError: by an error.
        """
        codes = [process.poll() for process in self.processes]
        if any(codes):
            self.kill()
            raise RuntimeError(self.log.read_text())
        return all(code == 0 for code in codes)

    def kill(self) -> None:
        """End all processes at once, as a machine that loses its power."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()


def finish(folder: Path, case: str, steps: int) -> None:
    """Let a run come to its end."""
    run = Started(folder, case, steps)
    for process in run.processes:
        process.communicate()
    run.ended()


def kill_once(folder: Path, case: str, steps: int, draw: random.Random, inside: bool) -> str | None:
    """Start the run and kill it; returns at which moment, None if it had ended before."""
    hold = folder.with_name(folder.name + ".hold") if inside else None
    run = Started(folder, case, steps, hold)
    if hold is not None:
        while not hold.exists():
            if run.ended():
                raise RuntimeError("the run ended without a second checkpoint")
            time.sleep(0.01)
        run.kill()
        return f"inside the write of {hold.read_text().removesuffix('.part')}"
    lines, wait = draw.randrange(5), draw.uniform(0, 0.3)
    last = "before the first logged step"
    if lines == 0:
        wait *= 20  # the start takes longer than a step
    for _ in range(lines):
        line = run.said.readline()
        if not line:
            break
        last = f"after {line.strip()}"
    time.sleep(wait)
    ended = run.ended()
    run.kill()
    return None if ended else last


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*") if path.suffix == ""]
    return max(steps, default=0)


def differences(folder: Path, reference: Path) -> list[str]:
    """What is not the same in two folders, byte by byte, except for times."""
    step = f"step-{newest(reference):08d}"
    files = {
        path.relative_to(place)
        for place in (folder, reference)
        for pattern in (f"checkpoints/{step}/*.safetensors", "heads*")
        for path in place.glob(pattern)
    }
    found = [str(file) for file in sorted(files) if _content(folder / file) != _content(reference / file)]
    own, its = _lines(folder), _lines(reference)
    found += [
        f"line {i + 1} of steps.jsonl" for i, (one, other) in enumerate(zip(own, its, strict=False)) if one != other
    ]
    if len(own) != len(its):
        found.append("number of lines of steps.jsonl")
    results = [json.loads((each / "result.json").read_text()) for each in (folder, reference)]
    told = [name for name in results[1] if name not in TIMES]
    return found + [f"result.json: {name}" for name in told if results[0].get(name) != results[1][name]]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def kills(place: Path, case: str, count: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """Kill runs `count` times in all, the second time inside a write; one row for each kill.

    A run is killed again and again until it ends; then the next one begins.
    """
    reference = place / "reference"
    finish(reference, case, steps)
    draw, rows, run = random.Random(seed), [], 0
    while len(rows) < count:
        run += 1
        folder, ended, first = place / f"run-{run}", False, len(rows)
        while not ended and len(rows) < count:
            moment = kill_once(folder, case, steps, draw, inside=len(rows) == 1)
            ended = moment is None
            if moment is not None:
                rows.append({"run": run, "killed": moment, "goes on from step": newest(folder)})
                print(f"{case:20} run {run}: killed {moment}, goes on from step {newest(folder)}", flush=True)
        finish(folder, case, steps)
        found = differences(folder, reference)
        print(f"{case:20} run {run}: {found or 'the same to the last bit'}", flush=True)
        for row in rows[first:]:
            row["differs"] = found
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--case", choices=STRATEGIES, action="append")
    parser.add_argument("--seed", type=int, default=0)
    for hidden, kind in (("child", Path), ("hold", Path), ("strategy", str), ("steps", int)):
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child, arguments.strategy, arguments.steps, arguments.hold)
        return
    import measure

    count, steps = 2 if arguments.quick else arguments.kills, 60
    rows = {} if arguments.quick else measure.rows_so_far("kill_resume")
    for case in arguments.case or STRATEGIES:
        with tempfile.TemporaryDirectory() as place:
            rows[case] = kills(Path(place), case, count, steps, arguments.seed)
        if not arguments.quick:
            measure.write("kill_resume", {"seed": arguments.seed, "steps": steps, "rows": rows})
    print(f"\n{'':20} {'kills':>6} {'runs':>5} {'runs that differ':>17}")
    for case, own in rows.items():
        differing = {row["run"] for row in own if row["differs"]}
        print(f"{case:20} {len(own):6} {own[-1]['run']:5} {len(differing):17}")


if __name__ == "__main__":
    main()
