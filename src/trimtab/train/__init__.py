"""The training loop and its checkpoints."""

from trimtab.train.hardware import Hardware
from trimtab.train.loop import train
from trimtab.train.progress import Progress, Result, read_result

__all__ = ["Hardware", "Progress", "Result", "read_result", "train"]
