"""Models and the reference that several files compare with."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class Mixed(nn.Module):
    """Linear, convolution and attention layers in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, stride=2)
        self.grouped = nn.Conv1d(16, 16, 3, padding=1, groups=4)
        self.volume = nn.Conv3d(1, 2, 2)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.separate = nn.MultiheadAttention(16, 2, kdim=16, vdim=8, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2)  # (B, 16, L)
        x = self.grouped(x).transpose(1, 2)
        x = self.norm(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.separate(x, x, x[..., :8])[0]
        volume = self.volume(x[:, None, None, :4, :4].expand(-1, -1, 2, -1, -1)).mean()
        return self.head(x.mean(1)) * volume


@pytest.fixture
def mixed() -> Callable[..., tuple[Mixed, Tensor]]:
    """Makes a model of all kinds of layers and an input for it; the same ones for the same seed."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Mixed, Tensor]:
        torch.manual_seed(seed)
        model = Mixed().to(dtype)
        return model, torch.randn(2, 3, 8, 8, dtype=dtype)

    return make


@pytest.fixture
def in_use() -> Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]:
    """Turns parameters of a converted model into those of the plain one, by the published definition.

    ``gamma W / (v^T W u)`` of each row block, u and v being constants, left to autograd.
    """

    def explicit(model: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = {name: tensor for name, tensor in parameters.items() if not name.endswith("gamma")}
        for prefix, module in model.named_modules():
            for weight_name, sizes in getattr(module, "_carried_sizes", {}).items():
                gamma_name = weight_name.replace("weight", "gamma")
                u, v = (getattr(module, weight_name.replace("weight", f"sigma_{side}")) for side in "uv")
                dot = f"{prefix}." if prefix else ""
                weight, gamma = parameters[dot + weight_name], parameters[dot + gamma_name]
                matrix = weight.t() if module.transposed else weight.flatten(1)
                blocks = zip(matrix.split(sizes), gamma.split(1), u[:, 0], v.split(sizes), strict=True)
                scaled = torch.cat([g * part / (left @ part @ right) for part, g, right, left in blocks])
                plain[dot + weight_name] = scaled.t() if module.transposed else scaled.reshape(weight.shape)
        return plain

    return explicit
