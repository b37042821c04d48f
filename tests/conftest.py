import sys
from pathlib import Path

# The helpers beside the tests are imported by name, here and in the processes that the tests start.
sys.path.insert(0, str(Path(__file__).parent))
