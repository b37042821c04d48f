"""What sigma-Reparam can be asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import nn

FilterFn = Callable[[nn.Module, str], bool]
"""Says of a layer and its dotted name whether it is meant."""


_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class SigmaReparam:
    """sigma-Reparam: every weight is used as ``gamma / sigma(W) · W`` (Zhai et al., ICML 2023, arXiv 2303.06296).

    When not to use it: with learning rates low enough that the plain model is stable, gamma = 1 trains more slowly;
    its best learning rate lies several times higher than the plain model's.

    Attributes:
        gamma_init: where gamma starts. "spectral": sigma(W), so that the model computes the same function as before.
            "one": 1, as in the paper, so that every weight in use starts with spectral norm 1; the scale of W
            then sets the effective learning rate. A float: that value.

    Raises:
        ValueError: if gamma_init is none of these.
    """

    gamma_init: Literal["spectral", "one"] | float = "spectral"

    def __post_init__(self) -> None:
        value: object = self.gamma_init
        if isinstance(value, bool) or not isinstance(value, str | Real):
            raise ValueError(f'gamma_init: expected "spectral", "one" or a number, got {value!r}')
        if isinstance(value, str) and value not in ("spectral", "one"):
            raise ValueError(f'gamma_init: expected "spectral", "one" or a number, got "{value}"')
        if isinstance(value, Real) and not abs(float(value)) <= _LARGEST:
            raise ValueError(f"gamma_init: expected a number that float32 can hold, got {value}")
