"""Stabilized models in two processes, whole (DDP) and in shards (FSDP2): they train like one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo_processes import in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trimtab.errors import ConversionError
from trimtab.models import ViT, ViTConfig
from trimtab.stabilizers import auxiliary_loss, fold_, stabilize_
from trimtab.stabilizers.auxiliary import record


def record_small_logits(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    record(module, 0.1 * output.square().mean())


def stabilized(spec: str) -> Any:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 5, "dim": 16, "depth": 2}
    model: Any = ViT(ViTConfig(**sizes, num_heads=2, mlp_ratio=2, init="xavier", norm="post")).double()
    stabilize_(model, spec)
    model.head.register_forward_hook(record_small_logits)
    return model


def train(model: nn.Module, part: slice) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 3, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[part]), labels[part])
        added = auxiliary_loss(model)
        assert added is not None
        (loss + added).backward()
        optimizer.step()


def trains_like_one_process(rank: int, specs: list[str]) -> None:
    part = slice(2 * rank, 2 * rank + 2)
    for spec in specs:
        reference = stabilized(spec)
        train(reference, slice(0, 4))
        expected = dict(reference.named_parameters())
        copied = stabilized(spec)
        train(DistributedDataParallel(copied), part)
        sharded = stabilized(spec)
        for block in sharded.blocks:
            fully_shard(block)
        fully_shard(sharded)
        train(sharded, part)
        for model in (copied, sharded):
            for name, parameter in model.named_parameters():
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                # Adam's first steps have the size of the learning rate, however small the gradient, so that sums taken
                # in another order show where a gradient is nearly zero
                torch.testing.assert_close(whole, expected[name], rtol=1e-6, atol=1e-8)
        if spec.startswith("layer-scale"):
            with pytest.raises(ConversionError, match="sharded"):
                fold_(sharded)
    plain = stabilized("none")
    fully_shard(plain)
    for spec in ("layer-scale", "deepnorm", "weight-norm", "low-rank", "sigma"):
        with pytest.raises(ConversionError, match="sharded already"):
            stabilize_(plain, spec)
    assert dist.get_world_size() == 2


_SPECS = ["layer-scale:init=0.5", "deepnorm+sigma:gamma_init=one", "weight-norm", "qk-norm", "qk-clip:tau=0.05"]
_SPECS += ["softcap:attention=0.5:logits=1+z-loss", "low-rank:rank=5+sigma"]


@pytest.mark.parametrize("specs", [_SPECS])
def test_two_processes(specs: list[str]) -> None:
    in_processes(2, trains_like_one_process, specs)
