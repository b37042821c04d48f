import sys

import pytest
import torch

from trimtab.train.memory import peak_memory, reset_peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process forget its peak")
def test_each_run_has_a_peak_of_its_own() -> None:
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    large = torch.ones(2**25)  # 128 MiB
    with_it = peak_memory(CPU)
    assert with_it - before > 100 * 2**20
    del large
    assert peak_memory(CPU) > with_it - 2**20  # the kernel counts pages in batches
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < with_it - 100 * 2**20
