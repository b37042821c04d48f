"""A checkpoint larger than the memory it takes: peak resident memory, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")

# Reduced to a Gram matrix, 16 MB each; and widened for Lanczos, 18 MB each and 36 MB in float32.
CASES = {"long": (8, 32, 2**17, torch.float32), "square": (6, 3072, 3072, torch.bfloat16)}

# What a process once needs (libraries, buffers of LAPACK) is spent on a small checkpoint first.
CHILD = """
import json, sys
from pathlib import Path
from trimtab.inspect import inspect_checkpoint

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

small, *large = sys.argv[1:]
inspect_checkpoint(small)
before = memory("VmRSS")
found = [len(inspect_checkpoint(path).matrices) for path in large]
print(json.dumps([memory("VmHWM") - before, found]))
"""


@pytest.mark.parametrize("case", CASES)
def test_memory_stays_within_three_tensors_in_float32(case: str, tmp_path: Path) -> None:
    tensors, rows, columns, dtype = CASES[case]
    weight = torch.randn(rows, columns).to(dtype)
    small = {
        "layers.0.mlp.up.weight": weight[:32, : 2**15 + 1].clone(),
        "layers.1.mlp.up.weight": torch.randn(300, 300),
    }
    torch.save(small, tmp_path / "small")
    # Each a memory of its own: torch would write a shared one once.
    weights = {f"layers.{number}.mlp.up.weight": weight.clone() for number in range(tensors)}
    save_file(weights, tmp_path / "safetensors")
    torch.save({"model": weights}, tmp_path / "torch")
    command = [sys.executable, "-c", CHILD, *(str(tmp_path / name) for name in ("small", "safetensors", "torch"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, found = json.loads(done.stdout)
    assert found == [tensors, tensors]
    assert peak < 3 * weight.numel() * 4, f"{peak / 2**20:.0f} MB"
