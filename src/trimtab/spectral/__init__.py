"""The largest singular value of a weight: exact start, block power iteration, per row block, sharded."""

from trimtab.spectral.exact import Leading, leading, spectral_norm
from trimtab.spectral.iteration import block_iteration
from trimtab.spectral.power import (
    Sizes,
    block_sigma,
    is_even,
    membership,
    per_row,
    replicated,
    right_vector_of_each_row,
    sum_blocks,
)
from trimtab.spectral.precision import exact_products, without_autocast
from trimtab.spectral.products import thin_product

__all__ = [
    "Leading",
    "Sizes",
    "block_iteration",
    "block_sigma",
    "exact_products",
    "is_even",
    "leading",
    "membership",
    "per_row",
    "replicated",
    "right_vector_of_each_row",
    "spectral_norm",
    "sum_blocks",
    "thin_product",
    "without_autocast",
]
