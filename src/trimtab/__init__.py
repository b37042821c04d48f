"""Trimtab keeps Transformer training stable: watch instability coming, steady it, compare the cures."""

from trimtab.attention import (
    AttentionStats,
    SampledEntropy,
    attention_entropy,
    attention_entropy_sampled,
    attention_stats,
    attention_stats_varlen,
    entropy_lower_bound,
)
from trimtab.errors import CheckpointError, ConversionError, DataError, RecipeError, RunFolderError, TrimtabError
from trimtab.optim import ASAM, SAM
from trimtab.reparam import (
    SigmaReparam,
    describe,
    effective_weight,
    refresh_,
    remove_norms_,
    reparametrize_,
    sigma_error,
)
from trimtab.stabilizers import auxiliary_loss, fold_, low_rank_, merge_low_rank_, save_pretrained, stabilize_
from trimtab.watch import Alarm, Thresholds, Watch, observe
from trimtab.watch.signals import (
    Sharpness,
    qk_energy,
    sharpness,
    stable_rank,
    token_embedding_variability,
)

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "SAM",
    "Alarm",
    "AttentionStats",
    "CheckpointError",
    "ConversionError",
    "DataError",
    "RecipeError",
    "RunFolderError",
    "SampledEntropy",
    "Sharpness",
    "SigmaReparam",
    "Thresholds",
    "TrimtabError",
    "Watch",
    "__version__",
    "attention_entropy",
    "attention_entropy_sampled",
    "attention_stats",
    "attention_stats_varlen",
    "auxiliary_loss",
    "describe",
    "effective_weight",
    "entropy_lower_bound",
    "fold_",
    "low_rank_",
    "merge_low_rank_",
    "observe",
    "qk_energy",
    "refresh_",
    "remove_norms_",
    "reparametrize_",
    "save_pretrained",
    "sharpness",
    "sigma_error",
    "stabilize_",
    "stable_rank",
    "token_embedding_variability",
]
