"""What Transformers of this folder share: a norm or none, the MLP of a block, and how weights start."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["pre", "post", "none"]
Init = Literal["torch", "normal", "trunc_normal", "xavier"]
Activation = Literal["relu", "gelu"]


def layer_norm(norm: Norm, dim: int) -> nn.Module:
    """A LayerNorm over `dim` features, or nothing in a model without norms."""
    return nn.Identity() if norm == "none" else nn.LayerNorm(dim)


class MLP(nn.Module):
    """Two layers with an activation between them, (..., dim) -> (..., dim), each token by itself."""

    def __init__(self, dim: int, hidden: int, activation: Activation = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.activation = F.relu if activation == "relu" else F.gelu
        self.up = nn.Linear(dim, hidden, bias)
        self.down = nn.Linear(hidden, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself; x and the result are (..., dim)."""
        transformed: Tensor = self.down(self.activation(self.up(x)))
        return transformed


@torch.no_grad()
def start_(module: nn.Module, init: Init, std: float, gain: float = 1.0) -> None:
    """Draw the weights of a linear or convolutional layer anew, from the global random number generator.

    Args:
        module: of any other kind it is left alone.
        init: PyTorch's own start, which is kept ("torch"), N(0, std²) ("normal"), the same cut off at two standard
            deviations ("trunc_normal"), or Glorot's uniform ("xavier"). Biases become zero, except with "torch".
        std: standard deviation for "normal" and "trunc_normal"; the other two do not use it.
        gain: factor on the weights.
    """
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        return
    if init == "normal":
        nn.init.normal_(module.weight, std=std)
    elif init == "trunc_normal":
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    elif init == "xavier":
        nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: all that a kernel sees counts as inputs
    if init != "torch" and module.bias is not None:
        nn.init.zeros_(module.bias)
    module.weight.mul_(gain)
