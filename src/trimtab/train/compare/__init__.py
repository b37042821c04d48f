"""Many runs side by side: every arm at every learning rate and seed."""

from trimtab.train.compare.running import Failure, compare

__all__ = ["Failure", "compare"]
