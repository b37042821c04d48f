"""Tasks on a Ray cluster: one core or GPU each, no second try, all of them writing to one shared folder."""

import logging
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import RunFolderError
from trimtab.train.compare.parcels import pack, unpack
from trimtab.train.compare.workers import Work

_POLL = 1.0  # seconds from one look at the folders to the next


def run_on_ray(
    work: Work,
    tasks: Mapping[str, Any],
    address: str,
    folder: Path,
    *,
    jobs: int | None,
    gpus: bool,
    look: Callable[[Any], Any],
    tell: Callable[[str, Any], None],
    lost: Callable[[Any, str, str], Any],
) -> dict[str, Any]:
    """Do every task on a Ray cluster, in the order given; like `trimtab.train.compare.workers.run_all`.

    Classes that stand in a file of your own are loaded from its path, which all nodes need, too.

    Args:
        work: what to do; what it tells meanwhile is not heard.
        tasks: name and task.
        address: of the cluster; "auto" for the one this machine belongs to.
        folder: where the tasks write; it must be the same on every node.
        jobs: tasks at once; by default as many as the cluster has room for.
        gpus: whether each task has a GPU, if the cluster has any.
        look: from a task that may be running to what its folder tells of it, None for nothing.
        tell: called with a task's name and what `look` tells when that is new, its outcome last.
        lost: the outcome of a task that raised or whose node died, from the task, the name of the exception, and
            what there is to say.

    Returns:
        The outcomes by name.

    Raises:
        RunFolderError: there is no cluster, or a node of it does not share the folder.
    """
    import ray

    parcels = {name: pack((work, task)) for name, task in tasks.items()}
    ours = not ray.is_initialized()
    if ours:
        try:
            _refuse_deaf(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError) as error:
            raise RunFolderError(f"there is no Ray cluster at {address!r}: {error}") from error
    running: dict[Any, str] = {}
    try:
        _check_shared(folder)
        share = {"num_gpus": 1} if gpus and ray.cluster_resources().get("GPU") else {}
        remote: Any = ray.remote(_do).options(num_cpus=1, max_retries=0, **share)
        waiting = deque(tasks)
        outcomes: dict[str, Any] = {}
        last: dict[str, Any] = {}
        while waiting or running:
            while waiting and (jobs is None or len(running) < jobs):
                name = waiting.popleft()
                running[remote.remote(parcels[name])] = name
            done, _ = ray.wait(list(running), num_returns=1, timeout=_POLL)
            for reference in done:
                name = running.pop(reference)
                outcomes[name] = _outcome(reference, tasks[name], lost)
                tell(name, outcomes[name])
            for name in running.values():
                news = look(tasks[name])
                if news is not None and news != last.get(name):
                    last[name] = news
                    tell(name, news)
        return outcomes
    finally:
        for reference in running:  # Ctrl-C: each saves a checkpoint as it would after a Ctrl-C of its own
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=60)
        if ours:
            ray.shutdown()


def _refuse_deaf(address: str) -> None:
    """Raise OSError if nothing listens there; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _do(parcel: bytes) -> Any:
    import torch

    torch.set_num_threads(1)
    work, task = unpack(parcel)
    return work(task, lambda news: None)


def _outcome(reference: Any, task: Any, lost: Callable[[Any, str, str], Any]) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return lost(task, type(error.cause).__name__, str(error.cause))
    except ray.exceptions.RayError as error:
        said = str(error).strip()
        return lost(task, "WorkerDied", f"{type(error).__name__}: {said.splitlines()[0] if said else ''}")


def _check_shared(folder: Path) -> None:
    """Let every node write a file into the folder, and find them all."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder.mkdir(parents=True, exist_ok=True)
    probe: Any = ray.remote(_write_probe)
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        path = folder / f".probe-{secrets.token_hex(8)}"
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        try:
            trouble = ray.get(probe.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(str(path)))
            if trouble is None and not path.is_file():
                trouble = "what it wrote there is not seen here"
        except ray.exceptions.RayError:  # it has just died, and will do no runs
            continue
        finally:
            path.unlink(missing_ok=True)
        if trouble:
            raise RunFolderError(
                f"the node {node['NodeManagerAddress']} of the cluster does not share {folder}: {trouble}. "
                "Choose a folder on a file system that all nodes mount at the same path"
            )


def _write_probe(path: str) -> str | None:
    """Write a file, on a node; return what went wrong."""
    try:
        with open(path, "x") as file:
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None
