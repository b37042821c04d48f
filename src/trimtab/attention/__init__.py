"""Inside the softmax: attention entropy, logit statistics, the lower bound on entropy; low-rank attention."""

from trimtab.attention.bound import entropy_lower_bound
from trimtab.attention.entropy import attention_entropy, attention_stats
from trimtab.attention.low_rank import LowRankAttention, LowRankLinear
from trimtab.attention.reference import attention_stats_reference
from trimtab.attention.sampled import SampledEntropy, attention_entropy_sampled
from trimtab.attention.stats import AttentionStats
from trimtab.attention.varlen import attention_stats_flash, attention_stats_varlen

__all__ = [
    "AttentionStats",
    "LowRankAttention",
    "LowRankLinear",
    "SampledEntropy",
    "attention_entropy",
    "attention_entropy_sampled",
    "attention_stats",
    "attention_stats_flash",
    "attention_stats_reference",
    "attention_stats_varlen",
    "entropy_lower_bound",
]
