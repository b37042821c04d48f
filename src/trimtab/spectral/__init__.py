"""The largest singular value of a weight: exact start, power iteration, per row block, sharded."""

from trimtab.spectral.exact import spectral_norm
from trimtab.spectral.power import Sizes, block_sigma, full_precision, per_row, power_iteration, store_vectors_

__all__ = ["Sizes", "block_sigma", "full_precision", "per_row", "power_iteration", "spectral_norm", "store_vectors_"]
