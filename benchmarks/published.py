"""The published sigma-Reparam, written down from its definition as plainly as can be: what the benchmarks compare with.

Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", ICML 2023, arXiv 2303.06296.
Every Linear and Conv2d is used with ``gamma · W / sigma``. A training forward does one power iteration,

    v = W u / |W u|        u = W^T v / |W^T v|        sigma = v^T W u

with u and v constants and sigma differentiated through W; weight, vectors and sigma are float32 (or float64), autocast
off. The weight in use is made anew in every forward. Conversion takes a singular value decomposition.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)
Triplet = tuple[Tensor, Tensor, Tensor]


def svd(matrix: Tensor) -> Triplet:
    """Return sigma (), u (columns,) and v (rows,) of a matrix by a full decomposition."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return values[0], right[0].clone(), left[:, 0].clone()


def convert_(model: ModelT, gamma_init: str = "spectral", decompose: Callable[[Tensor], Triplet] = svd) -> ModelT:
    """Convert every nn.Linear and nn.Conv2d of a model in place.

    Args:
        model: plain; subclasses of the two layers are left alone.
        gamma_init: "spectral" (sigma of the fresh weight) or "one".
        decompose: finds the leading singular triplet, for those who cannot wait for a full decomposition.
    """
    classes: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: PublishedLinear, nn.Conv2d: PublishedConv2d}
    for module in list(model.modules()):
        if type(module) in classes:
            sigma, u, v = decompose(_wide(module.weight.detach()).flatten(1))
            module.gamma = nn.Parameter((sigma if gamma_init == "spectral" else torch.ones_like(sigma)).reshape(1))
            module.register_buffer("u", u)
            module.register_buffer("v", v)
            module.__class__ = classes[type(module)]
    return model


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _weight_in_use(module: Any) -> Tensor:
    with torch.autocast(module.weight.device.type, enabled=False):
        weight = _wide(module.weight)
        matrix, u, v = weight.flatten(1), module.u, module.v
        if module.training:
            with torch.no_grad():
                v = F.normalize(matrix @ u, dim=0)
                u = F.normalize(matrix.t() @ v, dim=0)
                module.v.copy_(v)
                module.u.copy_(u)
        sigma = torch.dot(v, matrix @ u)
        return module.gamma * weight / sigma


class PublishedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _weight_in_use(self), self.bias)


class PublishedConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, _weight_in_use(self), self.bias)
