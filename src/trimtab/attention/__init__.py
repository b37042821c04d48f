"""Inside the softmax: attention entropy, logit statistics, entropy's lower bound; low-rank and channel attention."""

from trimtab.attention.bound import entropy_lower_bound
from trimtab.attention.channel import ChannelAttention
from trimtab.attention.entropy import attention_entropy, attention_stats
from trimtab.attention.low_rank import LowRankAttention, LowRankLinear
from trimtab.attention.reference import attention_stats_reference
from trimtab.attention.sampled import SampledEntropy, attention_entropy_sampled
from trimtab.attention.stats import AttentionStats
from trimtab.attention.varlen import attention_stats_flash, attention_stats_varlen

__all__ = [
    "AttentionStats",
    "ChannelAttention",
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
