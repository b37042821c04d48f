"""Runs a check in several gloo processes at once, and counts what processes send each other."""

import importlib.util
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A server process imports these once; the processes of every check are forks of it and start at once. It is the same
# server that the workers of `compare` are forked from, whichever needs it first.
_PRELOAD = [
    "pytest",
    "lightning_fabric",
    "torch._dynamo",  # loaded by the first step of any optimizer
    "trimtab.train.compare.running",
    "trimtab.train.compare.worker_process",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


def in_processes(count: int, check: Callable[..., None], *arguments: object) -> None:
    """Call ``check(rank, *arguments)`` in ``count`` processes; what one of them raises is raised here.

    A process that waits for another for five minutes raises too. The check is a function of a test file: processes
    cannot import that by name, so they load it by its path.
    """
    start_fork_server()
    where = (check.__code__.co_filename, check.__name__)
    with tempfile.TemporaryDirectory() as folder:  # where they meet; a port that is free now may be taken by then
        store = f"file://{folder}/store"
        mp.start_processes(_run, (count, store, where, arguments), nprocs=count, start_method="forkserver")


def start_fork_server() -> None:
    """Start it, unless it runs already."""
    multiprocessing.set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()


def _run(rank: int, count: int, store: str, where: tuple[str, str], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*sigma-Reparam")  # our own; torch warns of plain models too
    path, name = where
    dist.init_process_group("gloo", store, timedelta(seconds=300), world_size=count, rank=rank)
    try:
        getattr(_loaded(path), name)(rank, *arguments)
    finally:
        dist.destroy_process_group()


def _loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Collectives(TorchDispatchMode):
    """Records every collective call of this process inside its context: (operation, bytes handed in).

    And how many numbers the largest tensor holds that any operation here returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.largest = 0

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.calls)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # made of operations on pieces, which come here in their turn
        space, name = operation.name().split("::")
        if space in ("c10d", "_c10d_functional") and "wait" not in name and "wrap" not in name:
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            self.calls.append((name.strip("_"), sum(each.nbytes for each in tensors)))
        result = operation(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(each.numel() for each in tree_leaves(result) if isinstance(each, Tensor))])
        return result
