"""What is measured on a logging step: pure functions of tensors and models."""

from trimtab.watch.signals.embeddings import (
    TokenEmbeddingVariability,
    embedding_variability,
    token_embedding_variability,
)
from trimtab.watch.signals.gradients import GradientNoise, averaged, gradient_noise, gradient_norm
from trimtab.watch.signals.heads import HeadStats, head_stats, merge
from trimtab.watch.signals.losses import spike_score
from trimtab.watch.signals.projections import qk_energies, qk_weights
from trimtab.watch.signals.sharpness import Sharpness, sharpness
from trimtab.watch.signals.sigmas import SigmaTracker
from trimtab.watch.signals.spectra import collapse_kind, qk_energy
from trimtab.watch.signals.weights import plain_weights, stable_rank

__all__ = [
    "GradientNoise",
    "HeadStats",
    "Sharpness",
    "SigmaTracker",
    "TokenEmbeddingVariability",
    "averaged",
    "collapse_kind",
    "embedding_variability",
    "gradient_noise",
    "gradient_norm",
    "head_stats",
    "merge",
    "plain_weights",
    "qk_energies",
    "qk_energy",
    "qk_weights",
    "sharpness",
    "spike_score",
    "stable_rank",
    "token_embedding_variability",
]
