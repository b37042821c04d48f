"""What sigma-Reparam can be asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

FilterFn = Callable[[nn.Module, str], bool]
"""Says of a layer and its dotted name whether it is meant."""

BlocksFn = Callable[[nn.Module, str], int | Sequence[int] | None]
"""Says of a layer and its dotted name into how many equal row blocks, or into blocks of which rows, its weight is cut;
None: as "auto" would."""


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
        vectors: how many right singular vectors each sigma is tracked with. 1 is the published algorithm, one power
            iteration on one vector. More cost little, since the weight is read twice either way, and follow sigma far
            more closely when the learning rate is high (one block iteration with a Rayleigh-Ritz step).
        blocks: which rows of a weight have a sigma and a gamma of their own. "auto": query, key and value of
            nn.MultiheadAttention and of fused layers known to hold them one after the other. "one": one for every
            weight. "heads": one per attention head of every query, key and value projection. A function of
            (layer, dotted name): a number of equal blocks, the rows of each, or None for what "auto" does.
        embeddings: whether nn.Embedding is converted too, and with it a head that is tied to it. Code that multiplies
            by the embedding's weight without a layer of its own reads the trained weight, not the one in use.
        skip_zero: whether weights that are zero (a fresh LoRA factor, a zero-initialised output layer), which have
            no direction to normalise, are left plain instead of refused.

    Raises:
        ValueError: if gamma_init, vectors or blocks is none of these.
    """

    gamma_init: Literal["spectral", "one"] | float = "spectral"
    vectors: int = 4
    blocks: Literal["auto", "one", "heads"] | BlocksFn = "auto"
    embeddings: bool = False
    skip_zero: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.vectors, bool) or not isinstance(self.vectors, int) or self.vectors < 1:
            raise ValueError(f"vectors: expected a whole number from 1 up, got {self.vectors!r}")
        if not callable(self.blocks) and self.blocks not in ("auto", "one", "heads"):
            raise ValueError(f'blocks: expected "auto", "one", "heads" or a function, got {self.blocks!r}')
        value: object = self.gamma_init
        if isinstance(value, bool) or not isinstance(value, str | Real):
            raise ValueError(f'gamma_init: expected "spectral", "one" or a number, got {value!r}')
        if isinstance(value, str) and value not in ("spectral", "one"):
            raise ValueError(f'gamma_init: expected "spectral", "one" or a number, got "{value}"')
        if isinstance(value, Real) and not abs(float(value)) <= _LARGEST:
            raise ValueError(f"gamma_init: expected a number that float32 can hold, got {value}")

    def first_gamma(self, sigma: Tensor) -> Tensor:
        """Return the gamma to start with, given sigma; both of shape (blocks,)."""
        if self.gamma_init == "spectral":
            return sigma
        return torch.full_like(sigma, 1.0 if self.gamma_init == "one" else float(self.gamma_init))
