"""50 steps of AdamW against an independent, explicit implementation of the published algorithm."""

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt

SIZES = [(7, 16), (16, 16), (16, 4)]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 7, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (64,), generator=generator)


def weights() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(out, into, generator=generator, dtype=torch.float64) * 0.3,
            torch.randn(out, generator=generator, dtype=torch.float64) * 0.1,
        )
        for into, out in SIZES
    ]


def published(gamma_init: str, lr: float, steps: int) -> list[float]:
    """Every training forward does one power iteration with the weight at hand, then divides by v^T W u."""
    parameters, us = [], []
    for weight, bias in weights():
        _, values, right = torch.linalg.svd(weight)
        gamma = values[:1].clone() if gamma_init == "spectral" else torch.ones(1, dtype=torch.float64)
        parameters.append([t.clone().requires_grad_() for t in (weight, bias, gamma)])
        us.append(right[0])
    optimizer = torch.optim.AdamW([t for layer in parameters for t in layer], lr=lr)
    x, y = data()
    losses = []
    for _ in range(steps):
        hidden = x
        for i, (weight, bias, gamma) in enumerate(parameters):
            with torch.no_grad():
                v = weight @ us[i]
                v = v / v.norm()
                u = weight.t() @ v
                us[i] = u = u / u.norm()
            sigma = torch.einsum("i,ij,j->", v, weight, u)
            hidden = hidden @ (gamma * weight / sigma).t() + bias
            hidden = torch.tanh(hidden) if i < 2 else hidden
        loss = nn.functional.cross_entropy(hidden, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def ours(gamma_init: str, lr: float, steps: int) -> list[float]:
    net = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    with torch.no_grad():
        for layer, (weight, bias) in zip(net[::2], weights(), strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    tt.reparametrize_(net, tt.SigmaReparam(gamma_init=gamma_init, vectors=1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    x, y = data()
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("gamma_init", ["spectral", "one"])
@pytest.mark.parametrize("lr", [1e-3, 3e-2])
def test_fifty_adamw_steps_equal_the_published_algorithm(gamma_init: str, lr: float) -> None:
    theirs, mine = published(gamma_init, lr, 50), ours(gamma_init, lr, 50)
    assert theirs[-1] < theirs[0]  # it did train
    assert max(abs(a - b) for a, b in zip(theirs, mine, strict=True)) < 1e-8
