"""`spectral-norm`: sigma-Reparam without its gamma."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from trimtab.reparam import SigmaReparam
from trimtab.reparam import fold_ as fold_sigma_
from trimtab.reparam.carried import carried_names
from trimtab.reparam.layers import Reparametrized
from trimtab.stabilizers.parts import Layers
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.sigma import convert_, is_converted
from trimtab.stabilizers.stabilizer import Stabilizer


@register("spectral-norm")
@dataclass(frozen=True)
class SpectralNorm(Stabilizer):
    """Spectral normalisation: every weight is used as W / sigma(W), with spectral norm 1 throughout.

    Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018, arXiv 1802.05957; as an arm
    against sigma-Reparam in Zhai et al., arXiv 2303.06296. It is sigma with gamma fixed at 1 (a parameter that is not
    trained), with the same vectors, and folds.

    When not to use it: for accuracy. A Transformer whose weights may not grow learns less.

    Attributes:
        layers: which layers: "all", the Transformer's "blocks", or in them "attention" or "mlp".
        blocks: "auto", "one" or "heads": which rows of a weight have a sigma of their own, see `SigmaReparam`.
    """

    order = 10

    layers: Layers = "all"
    blocks: Literal["auto", "one", "heads"] = "auto"

    def apply_(self, model: nn.Module) -> None:
        """Convert the layers meant, and fix their gammas."""
        config = SigmaReparam(gamma_init="one", blocks=self.blocks)
        for module in convert_(model, config, self.layers, remove_norms=False, init_std=None):
            assert isinstance(module, Reparametrized)
            for weight_name in module._carried_sizes:
                module.get_parameter(carried_names(weight_name)[0]).requires_grad_(False)

    def fold_(self, model: nn.Module) -> None:
        """Write W / sigma(W) into the weights."""
        if is_converted(model):
            fold_sigma_(model)
