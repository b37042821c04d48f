"""Weights under sigma-Reparam in a checkpoint: gamma and the singular vectors that are stored beside them."""

from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.inspect.stored import Checkpoint, Entry
from trimtab.reparam.carried import carried_names as names_beside
from trimtab.spectral import block_sigma

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Converted:
    """What lies beside one converted weight.

    Attributes:
        names: of gamma, of the right and of the left singular vectors.
        load: reads one of them.
        transposed: whether the weight is known to be stored (inputs, outputs).
    """

    names: tuple[str, str, str]
    load: Callable[[str], Tensor]
    transposed: bool

    def read(self, weight: Tensor, parts: list[int]) -> tuple[Numbers, Numbers]:
        """Return gamma and the sigma in use, each with a number for every block.

        Args:
            weight: as stored.
            parts: the rows of query, key and value, in case the blocks are these.

        Returns:
            The second is () where the rows of the blocks cannot be told.
        """
        gamma, basis, v = (self.load(name).clone() for name in self.names)
        u = basis[:, 0].to(v.dtype)
        transposed = self.transposed or (weight.ndim == 2 and weight.shape[0] != len(v) == weight.shape[1])
        matrix = weight.t() if transposed else weight.flatten(1)
        blocks = len(gamma)
        even = [len(v) // blocks] * blocks
        for sizes in (even, parts):
            # The left vector of every block has unit length, so sizes that are not the blocks' own are found out.
            if len(sizes) == blocks and sum(sizes) == len(v) == matrix.shape[0] and _unit_lengths(v, sizes):
                return _numbers(gamma), _numbers(block_sigma(matrix.to(v.dtype), u, v, tuple(sizes)))
        return _numbers(gamma), ()


def converted_weights(checkpoint: Checkpoint, transposed: Container[str]) -> dict[str, Converted]:
    """The converted weights of a checkpoint by name; `transposed` names those stored (inputs, outputs)."""
    found = {}
    for name, entry in checkpoint.entries.items():
        prefix, _, own = name.rpartition(".")
        if "weight" in own and len(entry.shape) >= 2:
            beside = tuple(f"{prefix}.{each}".lstrip(".") for each in names_beside(own))
            entries: list[Entry | None] = [checkpoint.entries.get(each) for each in beside]
            if all(each is not None and not each.unread for each in entries):
                found[name] = Converted((beside[0], beside[1], beside[2]), checkpoint.load, name in transposed)
    return found


def _unit_lengths(v: Tensor, sizes: list[int]) -> bool:
    lengths = torch.stack([part.norm() for part in v.split(sizes)])
    return bool((lengths - 1).abs().max() < 1e-3)  # float32 vectors keep theirs to 1e-6


def _numbers(values: Tensor) -> Numbers:
    return tuple(values.double().tolist())
