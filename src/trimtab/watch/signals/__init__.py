"""What is measured on a logging step: pure functions of tensors and models."""

from trimtab.watch.signals.gradients import gradient_norm
from trimtab.watch.signals.heads import HeadStats, head_stats, merge, visible_keys
from trimtab.watch.signals.weights import plain_sigmas

__all__ = ["HeadStats", "gradient_norm", "head_stats", "merge", "plain_sigmas", "visible_keys"]
