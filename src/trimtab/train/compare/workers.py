"""Worker processes that do one task after another, each with its share of the cores or a GPU of its own.

The main process and a worker hold the two ends of a pipe. A worker whose other end is gone, because the main process
was killed, ends at once; the main process learns in the same way that a worker was killed, and starts another.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from trimtab.train.compare.parcels import pack
from trimtab.train.compare.worker_process import serve

logger = logging.getLogger("trimtab")

Work = Callable[[Any, Callable[[Any], None]], Any]
"""Does a task in a worker, may tell of it meanwhile, and returns its outcome. All of it can be pickled."""

_POLL = 1.0  # seconds; Windows hears of Ctrl-C no sooner
_STARTS = 3  # workers that may end one after another without having begun


@dataclass
class _Worker:
    """A process, its pipe, and what it does."""

    process: Any
    connection: "Connection[Any, Any]"
    slot: int
    ready: bool = False
    task: str | None = None


def run_all(
    work: Work,
    tasks: Mapping[str, Any],
    *,
    jobs: int,
    threads: int = 1,
    gpus: Sequence[str] = (),
    preload: Sequence[str] = (),
    tell: Callable[[str, Any], None],
    lost: Callable[[Any, str, str], Any],
) -> dict[str, Any]:
    """Do every task in worker processes, in the order given.

    Ctrl-C, SIGTERM and any error here send SIGTERM to the workers, which may save what they have, and wait for them;
    a second Ctrl-C does not wait. Workers import the script that calls this, so it needs
    ``if __name__ == "__main__":``.

    Args:
        work: what to do.
        tasks: name and task.
        jobs: workers at once.
        threads: of torch, in each worker.
        gpus: as CUDA_VISIBLE_DEVICES names them; the workers share them evenly. None of them: the workers see what
            this process sees.
        preload: modules that all workers need; where the system can, they are imported once for all of them.
        tell: called with a task's name and what its work tells, its outcome last.
        lost: the outcome of a task whose work raised or whose worker was killed, from the task, the name of the
            exception or "WorkerDied", and what there is to say.

    Returns:
        The outcomes by name.

    Raises:
        Exception: a task cannot be pickled; pickle's own error.
        RuntimeError: no worker can be started.
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    context = _context(gpus, preload)
    parcels = {name: pack((work, task)) for name, task in tasks.items()}
    waiting = deque(tasks)
    outcomes: dict[str, Any] = {}
    told: set[tuple[Any, ...]] = set()
    workers: list[_Worker] = []
    failed_starts = 0

    def hear(worker: _Worker, kind: str, news: Any) -> None:
        if kind == "ready":
            worker.ready = True
        elif kind == "log":
            if news not in told:  # all runs on the same data say the same of them
                told.add(news)
                logger.log(*news)
        elif worker.task is not None:
            name = worker.task
            if kind == "lost":
                kind, news = "outcome", lost(tasks[name], *news)
            if kind == "outcome":
                outcomes[name] = news
                worker.task = None
            tell(name, news)

    with _terminated_is_interrupted():
        try:
            while len(outcomes) < len(tasks):
                free = set(range(min(jobs, len(waiting) + len(workers)))) - {worker.slot for worker in workers}
                if waiting:
                    workers.extend(_start(context, slot, threads, gpus) for slot in sorted(free))
                for worker in workers:
                    if worker.ready and worker.task is None and waiting:
                        worker.task = waiting.popleft()
                        _send(worker, parcels[worker.task])
                for worker in _listen(workers, hear):
                    workers.remove(worker)
                    how = _how_it_ended(worker)
                    _close(worker)
                    failed_starts = 0 if worker.ready else failed_starts + 1
                    if failed_starts == _STARTS:
                        raise RuntimeError(
                            f"no worker process starts: {how}. Its error stands above; a script that starts workers "
                            'does so below `if __name__ == "__main__":`'
                        )
                    hear(worker, "lost", ("WorkerDied", how))
        except BaseException:
            _stop(workers, hear)
            raise
        finally:
            _end(workers)
    return outcomes


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def _context(gpus: Sequence[str], preload: Sequence[str]) -> Any:
    """How processes are started: forks of one server that has imported what they need, or else new interpreters."""
    if gpus or "forkserver" not in multiprocessing.get_all_start_methods():  # CUDA does not survive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([serve.__module__, *preload])
    # A scheduler's SIGTERM goes to every process. Without the server nobody knows when a worker ends.
    with _handler(signal.SIGTERM, signal.SIG_IGN):
        forkserver.ensure_running()
    return context


def _start(context: Any, slot: int, threads: int, gpus: Sequence[str]) -> _Worker:
    ours, theirs = context.Pipe()
    environment = {"OMP_NUM_THREADS": str(threads)}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    process = context.Process(target=serve, args=(theirs, threads, environment), name=f"trimtab worker {slot}")
    with _interrupts_ignored(), _environment(environment):  # inherited by a new interpreter before it imports torch
        process.start()
    theirs.close()
    return _Worker(process, ours, slot)


def _listen(workers: Sequence[_Worker], hear: Callable[[_Worker, str, Any], None]) -> list[_Worker]:
    """Wait a while for messages and hear them; return the workers that have ended."""
    wait([end for worker in workers for end in (worker.connection, worker.process.sentinel)], _POLL)
    ended = []
    for worker in workers:
        alive = worker.process.is_alive()  # asked first: what it sent before it ended is still heard
        try:
            while worker.connection.poll():
                hear(worker, *worker.connection.recv())
        except (EOFError, ConnectionError):
            alive = False
        if not alive:
            ended.append(worker)
    return ended


def _stop(workers: list[_Worker], hear: Callable[[_Worker, str, Any], None]) -> None:
    """Ask the workers at work to stop, and hear their last words."""
    logger.warning("stopping: the runs under way save first; Ctrl-C again ends them at once")
    for worker in workers:
        if worker.task is not None:
            worker.process.terminate()
    busy = [worker for worker in workers if worker.task is not None]
    while busy:
        ended = _listen(busy, hear)
        busy = [worker for worker in busy if worker.task is not None and worker not in ended]


def _end(workers: Sequence[_Worker]) -> None:
    """End every process: idle ones by a word, the others by force."""
    for worker in workers:
        if worker.ready and worker.task is None:
            _send(worker, b"")
        else:
            worker.process.kill()
    for worker in workers:
        worker.process.join(10)
        worker.process.kill()
        _close(worker)


def _close(worker: _Worker) -> None:
    worker.process.join()
    worker.process.close()
    worker.connection.close()


def _send(worker: _Worker, message: bytes) -> None:
    with contextlib.suppress(OSError):  # it has ended, which `_listen` finds out
        worker.connection.send_bytes(message)


def _how_it_ended(worker: _Worker) -> str:
    worker.process.join()
    code = worker.process.exitcode
    if code >= 0:
        return f"its process ended by itself, with exit code {code}"
    name = signal.Signals(-code).name
    return f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    with _handler(signal.SIGINT, signal.SIG_IGN):
        yield


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Within it, SIGTERM is a KeyboardInterrupt."""
    with _handler(signal.SIGTERM, signal.default_int_handler):
        yield


@contextmanager
def _handler(number: signal.Signals, handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
