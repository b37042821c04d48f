import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The helpers beside the tests are imported by name, here and in the processes that the tests start.
sys.path.insert(0, str(Path(__file__).parent))

# Several pytest workers have a core each (`make test`), and so have the processes that their tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch.compile compiles in this process: a pool of others would import torch in each of them first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# No test is timed: a busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Worker processes of `compare` are forks of a server that has imported what they need."""
    from gloo_processes import start_fork_server

    start_fork_server()
