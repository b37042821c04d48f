"""`Hardware`: where a run trains. It decides how fast, not what."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from trimtab.errors import RecipeError
from trimtab.tasks.recipe import Precision

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Strategy = Literal["auto", "ddp", "fsdp"]


@dataclass(frozen=True)
class Hardware:
    """Where a run trains; under torchrun, on all of its processes.

    Attributes:
        accelerator: "auto" takes a GPU where there is one.
        strategy: how several processes share the work: "ddp" gives each the whole model; "fsdp" (FSDP2) gives each a
            shard of every weight; "auto" is "ddp" for several and nothing for one.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    strategy: Strategy = "auto"


@contextmanager
def launched(hardware: Hardware, precision: Precision) -> Iterator["Fabric"]:
    """Make the Fabric of this process; in a process that torchrun started, it joins the others.

    Raises:
        RecipeError: the machine has no such hardware, or not at this precision.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    several = dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    processes = int(os.environ["WORLD_SIZE"]) if several else 1
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if several else 1
    gpu = checked(hardware, precision, processes)
    joined_before = several and dist.is_initialized()
    with _quietly():
        fabric = Fabric(
            accelerator="gpu" if gpu else "cpu",
            strategy=_strategy(hardware, processes),
            devices=on_this_machine,
            num_nodes=processes // on_this_machine,
            precision={"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[precision],
            plugins=[TorchElasticEnvironment() if several else LightningEnvironment()],
        )
        fabric.launch()
    try:
        yield fabric
    finally:
        if several and not joined_before and dist.is_initialized():
            dist.destroy_process_group()


def distributed(fabric: "Fabric", module: nn.Module, *, compiled: bool) -> nn.Module:
    """Move a model to the device, in place, and return what is called in its place while training."""
    fabric.to_device(module)
    if compiled:
        module.compile()  # in place: names and classes stay
    # The strategy itself: what Fabric would wrap around it casts inputs that autocast leaves alone, and costs time.
    shared = fabric.strategy.setup_module(module)
    if isinstance(shared, nn.parallel.DistributedDataParallel):
        _let_torch_advise_unheard(fabric.device)
    return shared


def _let_torch_advise_unheard(device: torch.device) -> None:
    """Torch advises, once a process, against looking for unused parameters where there are none; nobody can act on it.

    It writes to the standard error past Python's warnings, at the first forward: here of a model of its own, which
    draws no random number.
    """
    model = nn.utils.skip_init(nn.Linear, 1, 1, device=device)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    sys.stderr.flush()
    heard, unheard = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(unheard, 2)
    try:
        parallel(torch.zeros(1, 1, device=device))
    finally:
        os.dup2(heard, 2)
        os.close(heard)
        os.close(unheard)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Fabric's lines about what it has chosen; its warnings are heard."""
    fabrics = logging.getLogger("lightning_fabric")
    level = fabrics.level
    fabrics.setLevel(logging.WARNING)
    try:
        yield
    finally:
        fabrics.setLevel(level)


def checked(hardware: Hardware, precision: Precision, processes: int = 1) -> bool:
    """Whether it is a GPU.

    Raises:
        RecipeError: the machine has no such hardware, or not at this precision.
    """
    gpu = _wants_gpu(hardware)
    if precision == "fp16" and not gpu:
        raise RecipeError('precision "fp16" needs a GPU: use "bf16" or "32" on a CPU')
    if hardware.strategy == "fsdp" and precision == "fp16":
        raise RecipeError('precision "fp16" does not go with strategy "fsdp": use "bf16"')
    if hardware.strategy != "auto" and processes == 1:
        raise RecipeError(
            f"strategy {hardware.strategy!r} shares the work of several processes, and there is one: "
            f"start them with `torchrun --nproc-per-node 2 -m trimtab train ... --strategy {hardware.strategy}`"
        )
    return gpu


def _wants_gpu(hardware: Hardware) -> bool:
    there = torch.cuda.is_available() or torch.backends.mps.is_available()
    if hardware.accelerator == "gpu" and not there:
        raise RecipeError('accelerator "gpu" was asked for, and torch finds no GPU here: use "cpu", or "auto"')
    return torch.cuda.is_available() if hardware.accelerator == "auto" else hardware.accelerator == "gpu"


def _strategy(hardware: Hardware, processes: int) -> Any:
    if processes == 1:
        return "auto"
    if hardware.strategy == "fsdp":
        from lightning_fabric.strategies import ModelParallelStrategy

        return ModelParallelStrategy(_shard_, data_parallel_size=processes, tensor_parallel_size=1)
    from lightning_fabric.strategies import DDPStrategy

    # Layers that a step leaves out, and frozen ones, are no error.
    return DDPStrategy(find_unused_parameters=True)


def _shard_(module: nn.Module, mesh: Any) -> nn.Module:
    """Shard every block, then what is left: so that one block at a time is whole."""
    from torch.distributed.fsdp import fully_shard

    inside: set[nn.Module] = set()
    for blocks in module.modules():
        if isinstance(blocks, nn.ModuleList) and blocks not in inside:
            inside.update(blocks.modules())
            for block in blocks:
                fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])
    return module


def reshard_(module: nn.Module) -> None:
    """Let go of the whole weights that FSDP2 keeps after a forward without a backward: they would go stale."""
    if not dist.is_available() or not dist.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
