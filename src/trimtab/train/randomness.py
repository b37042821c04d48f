"""The random number generators and number modes that a run depends on, put back as they were."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def numerics(seed: int, device: torch.device) -> Iterator[None]:
    """Seed all generators and flush denormals, and leave everything as it was.

    A collapsed softmax is full of denormals, which slow a CPU about 1.5 times; the results are the same up to such
    numbers. The mode is each thread's own: torch's threads have it if they are started in here, as in a new process,
    and not if they have computed before.
    """
    flushing = sys.float_info.min / 2 == 0.0  # torch can set the mode but not tell it
    with kept(device):
        seed_all(seed)
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(flushing)


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Leave the generators of torch, NumPy and Python as they were."""
    from trimtab.train.random_states import random_states, restore_random_states  # which uses `seed_all`

    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)


def seed_all(seed: int) -> None:
    """Seed the generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # it takes no more
    random.seed(seed)
