"""sigma-Reparam on modules: config, layers, conversion."""

from trimtab.reparam.config import FilterFn, SigmaReparam
from trimtab.reparam.convert import effective_weight, fold_, refresh_, reparametrize_
from trimtab.reparam.describe import describe
from trimtab.reparam.norms import remove_norms_
from trimtab.reparam.sigmas import sigma_error, sigma_gamma, stable_ranks

__all__ = [
    "FilterFn",
    "SigmaReparam",
    "describe",
    "effective_weight",
    "fold_",
    "refresh_",
    "remove_norms_",
    "reparametrize_",
    "sigma_error",
    "sigma_gamma",
    "stable_ranks",
]
