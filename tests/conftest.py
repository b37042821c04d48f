import sys
from pathlib import Path

from hypothesis import settings

# The helpers beside the tests are imported by name, here and in the processes that the tests start.
sys.path.insert(0, str(Path(__file__).parent))

# No test is timed: a busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
