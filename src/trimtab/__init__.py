"""Trimtab keeps Transformer training stable: watch instability coming, steady it, compare the cures."""

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
)

__version__ = "0.1.0"

__all__ = [
    "ConversionError",
    "DataError",
    "RecipeError",
    "RunFolderError",
    "SigmaReparam",
    "TrimtabError",
    "__version__",
    "describe",
    "effective_weight",
    "fold_",
    "refresh_",
    "remove_norms_",
    "reparametrize_",
    "save_pretrained",
]
