"""The training loop and its checkpoints."""

from trimtab.train.checkpoint import load_checkpoint, save_checkpoint
from trimtab.train.loop import Progress, Result, build_model, train

__all__ = [
    "Progress",
    "Result",
    "build_model",
    "load_checkpoint",
    "save_checkpoint",
    "train",
]
