"""What a run saves, so that it can go on to the very bits of one that was never interrupted."""

from trimtab.train.checkpoints.checkpoint import load_checkpoint, load_weights, save_checkpoint
from trimtab.train.checkpoints.kept import best_checkpoint, newest_checkpoint

__all__ = ["best_checkpoint", "load_checkpoint", "load_weights", "newest_checkpoint", "save_checkpoint"]
