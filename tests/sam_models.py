"""A small network that SAM trains in many tests, its loss, and the closure that SAM asks for."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    loss: Tensor = (model(x) - 0.3 * x[:, :3]).square().mean()
    return loss


def closure_of(optimizer: torch.optim.Optimizer, model: nn.Module, seed: int = 1) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        return loss

    return closure
