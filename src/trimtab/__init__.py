"""Trimtab keeps Transformer training stable: watch instability coming, steady it, compare the cures."""

from trimtab.errors import ConversionError, DataError, RecipeError, RunFolderError, TrimtabError

__version__ = "0.1.0"

__all__ = [
    "ConversionError",
    "DataError",
    "RecipeError",
    "RunFolderError",
    "TrimtabError",
    "__version__",
]
