"""Inside the softmax: attention entropy, logit statistics, and the lower bound on entropy."""

from trimtab.attention.bound import entropy_lower_bound
from trimtab.attention.entropy import AttentionStats, attention_entropy, attention_stats
from trimtab.attention.reference import attention_stats_reference

__all__ = [
    "AttentionStats",
    "attention_entropy",
    "attention_stats",
    "attention_stats_reference",
    "entropy_lower_bound",
]
