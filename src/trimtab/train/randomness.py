"""The random number generators and number modes that a run depends on, put back as they were."""

import hashlib
import math
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


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


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of all generators of this process, as tensors by name."""
    _, words, gauss = random.getstate()
    _, key, position, has_gauss, numpy_gauss = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*map(int, key), int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor(numpy_gauss, dtype=torch.float64),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set every generator to what `random_states` returned; on a kind of device that it did not know, that stays."""
    gauss = states["python_gauss"].item()
    random.setstate((3, tuple(states["python"].tolist()), None if math.isnan(gauss) else gauss))
    *key, position, has_gauss = states["numpy"].tolist()
    words = np.array(key, dtype=np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"].clone())
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"].clone(), device)


def seed_new_process(step: int, rank: int) -> None:
    """Seed every generator of a process that a checkpoint has no states for, differently at each step and rank."""
    digest = hashlib.sha256(f"step {step} rank {rank}".encode()).digest()
    seed_all(int.from_bytes(digest[:7], "big"))
