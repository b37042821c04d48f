"""See a model train without touching it: taps on its attention, activations, gradients and optimisers.

A tap asks `wanted()` first, so that on steps that are not logged it costs one call.
"""

from trimtab.watch.taps.activations import ActivationTap
from trimtab.watch.taps.attention import AttentionTap
from trimtab.watch.taps.gradients import GradientTap
from trimtab.watch.taps.optimizer import OptimizerTap

__all__ = ["ActivationTap", "AttentionTap", "GradientTap", "OptimizerTap"]
