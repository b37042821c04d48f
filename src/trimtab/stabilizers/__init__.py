"""Every stabilizer by name: what it changes, when not to use it; and `stabilize_`, which applies them."""

from trimtab.stabilizers.apply import stabilize_, with_changes
from trimtab.stabilizers.auxiliary import auxiliary_loss
from trimtab.stabilizers.clip import Clip
from trimtab.stabilizers.clipper import see_compiled_
from trimtab.stabilizers.deepnorm import DeepNorm
from trimtab.stabilizers.fold import fold_
from trimtab.stabilizers.init_scale import InitScale
from trimtab.stabilizers.layer_scale import LayerScale
from trimtab.stabilizers.low_rank import LowRank
from trimtab.stabilizers.low_rank_layers import LowRankFit, low_rank_
from trimtab.stabilizers.low_rank_merge import merge_low_rank_
from trimtab.stabilizers.muon import Muon
from trimtab.stabilizers.none import NoStabilizer
from trimtab.stabilizers.qk_clip import QKClip
from trimtab.stabilizers.qk_norm import QKNorm
from trimtab.stabilizers.registry import STABILIZERS, parse, register, spec_of
from trimtab.stabilizers.rezero import ReZero
from trimtab.stabilizers.sam import SharpnessAware
from trimtab.stabilizers.saving import save_pretrained
from trimtab.stabilizers.sigma import Sigma
from trimtab.stabilizers.softcap import SoftCap
from trimtab.stabilizers.spectral_norm import SpectralNorm
from trimtab.stabilizers.stabilizer import Stabilizer
from trimtab.stabilizers.warmup import Warmup
from trimtab.stabilizers.weight_norm import WeightNorm
from trimtab.stabilizers.z_loss import ZLoss

__all__ = [
    "STABILIZERS",
    "Clip",
    "DeepNorm",
    "InitScale",
    "LayerScale",
    "LowRank",
    "LowRankFit",
    "Muon",
    "NoStabilizer",
    "QKClip",
    "QKNorm",
    "ReZero",
    "SharpnessAware",
    "Sigma",
    "SoftCap",
    "SpectralNorm",
    "Stabilizer",
    "Warmup",
    "WeightNorm",
    "ZLoss",
    "auxiliary_loss",
    "fold_",
    "low_rank_",
    "merge_low_rank_",
    "parse",
    "register",
    "save_pretrained",
    "see_compiled_",
    "spec_of",
    "stabilize_",
    "with_changes",
]
