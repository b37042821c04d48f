"""Sharpness-aware minimisation, SAM and ASAM, over any optimiser of torch's kind."""

from trimtab.optim.asam import ASAM
from trimtab.optim.sam import SAM

__all__ = ["ASAM", "SAM"]
