"""Look into a checkpoint: sigma, stable rank, q/k energy and embeddings, layer by layer, without running its code."""

from trimtab.inspect.inspection import inspect_checkpoint
from trimtab.inspect.report import Attention, Embedding, Matrix, Report, Skipped, Vector

__all__ = [
    "Attention",
    "Embedding",
    "Matrix",
    "Report",
    "Skipped",
    "Vector",
    "inspect_checkpoint",
]
