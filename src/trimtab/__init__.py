"""Trimtab keeps Transformer training stable: watch instability coming, steady it, compare the cures."""

from trimtab.attention import AttentionStats, attention_entropy, attention_stats, entropy_lower_bound
from trimtab.errors import ConversionError, DataError, RecipeError, RunFolderError, TrimtabError
from trimtab.reparam import (
    SigmaReparam,
    describe,
    effective_weight,
    fold_,
    refresh_,
    remove_norms_,
    reparametrize_,
    save_pretrained,
    sigma_error,
)
from trimtab.watch import Alarm, Watch

__version__ = "0.1.0"

__all__ = [
    "Alarm",
    "AttentionStats",
    "ConversionError",
    "DataError",
    "RecipeError",
    "RunFolderError",
    "SigmaReparam",
    "TrimtabError",
    "Watch",
    "__version__",
    "attention_entropy",
    "attention_stats",
    "describe",
    "effective_weight",
    "entropy_lower_bound",
    "fold_",
    "refresh_",
    "remove_norms_",
    "reparametrize_",
    "save_pretrained",
    "sigma_error",
]
