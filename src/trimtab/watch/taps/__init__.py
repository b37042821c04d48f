"""See a model train without touching it: taps on its attention and on its optimisers.

A tap asks `wanted()` first, so that on steps that are not logged it costs one call.
"""

from trimtab.watch.taps.attention import AttentionTap
from trimtab.watch.taps.optimizer import OptimizerTap

__all__ = ["AttentionTap", "OptimizerTap"]
