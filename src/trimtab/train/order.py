"""The order of the examples: a pure function of the seed and the step, whatever the number of processes."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor


def derived_seed(*parts: int | str) -> int:
    """A seed of its own for each purpose, from 0 to 2^63 - 1."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def batch_indices(num_examples: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The examples of a step of all processes together, (batch_size,) int64.

    Each pass over the examples has a new order, and leaves out its last, short batch.

    Args:
        num_examples: at least `batch_size`.
        batch_size: examples in a step.
        seed: decides the order.
        step: counted from 1.
    """
    epoch, position = divmod(step - 1, num_examples // batch_size)
    return _permutation(num_examples, seed, epoch)[position * batch_size : (position + 1) * batch_size]


def batches(num_examples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """The same for step 1, 2, 3 ..., without end."""
    for step in count(1):
        yield batch_indices(num_examples, batch_size, seed, step)


def own_share(indices: Tensor, accumulate: int, rank: int, processes: int) -> list[Tensor]:
    """The micro-batches of one process: each micro-batch of the step is cut into as many parts as there are processes.

    Args:
        indices: (batch_size,), a multiple of accumulate × processes.
        accumulate: micro-batches in a step.
        rank: of the process.
        processes: how many there are.

    Returns:
        `accumulate` tensors of (batch_size / accumulate / processes,).
    """
    return list(indices.view(accumulate, processes, -1)[:, rank])


@lru_cache(maxsize=1)
def _permutation(num_examples: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed("order", seed, epoch))
    return torch.randperm(num_examples, generator=generator)
