import multiprocessing
import sys
from pathlib import Path

import torch.distributed as dist

# The helpers beside the tests are imported by name, here and in the processes that the tests start.
sys.path.insert(0, str(Path(__file__).parent))

possible = dist.is_available() and dist.is_gloo_available() and "forkserver" in multiprocessing.get_all_start_methods()
collect_ignore_glob = [] if possible else ["test_*.py"]
