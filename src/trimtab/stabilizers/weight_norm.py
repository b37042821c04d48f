"""`weight-norm`: length and direction of every weight row, apart."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from trimtab.errors import ConversionError
from trimtab.reparam import SigmaReparam
from trimtab.reparam.carried import is_sharded, memory_of
from trimtab.reparam.plan import Site, choose
from trimtab.stabilizers.parts import Layers, layers_filter
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer


@register("weight-norm")
@dataclass(frozen=True)
class WeightNorm(Stabilizer):
    """Weight normalisation: every output's weights w are used as g · v / |v|, g and v being trained.

    Salimans and Kingma, "Weight Normalization", NeurIPS 2016, arXiv 1602.07868, equation (2). It changes every Linear,
    convolution and attention projection, by torch's own parametrization (state-dict keys
    ``...parametrizations.weight.original0`` for g and ``original1`` for v), keeps the function and folds.

    When not to use it: for speed (it writes a second copy of every weight in every forward), where a model is pickled
    whole (torch's parametrizations cannot be), or for a bound on attention logits, which it does not give.

    Attributes:
        layers: which layers: "all", the Transformer's "blocks", or in them "attention" or "mlp".
    """

    order = 10

    layers: Layers = "all"

    def apply_(self, model: nn.Module) -> None:
        """Parametrize the weights of the layers meant."""
        taken = [name for name, module in model.named_modules() if weight_normed(module)]
        if taken:
            raise ConversionError(f"{taken[0] or 'the model'} has weight norm already: fold_ it first")
        sites, _ = choose(model, SigmaReparam(blocks="one"), layers_filter(model, self.layers))
        first: dict[int, Site] = {}
        for site in sites:
            other = first.setdefault(memory_of(site.weight), site)
            if other is not site:
                raise ConversionError(
                    f"{other.name} and {site.name} are one weight, which weight norm would tear apart: untie them, or "
                    "choose other layers"
                )
            _expect_directions(site)
        for site in sites:
            parametrizations.weight_norm(site.module, site.weight_name, dim=1 if site.transposed else 0)

    def fold_(self, model: nn.Module) -> None:
        """Write g · v / |v| into the weights."""
        found = [(name, module, weight) for name, module in model.named_modules() for weight in weight_normed(module)]
        for name, module, weight in found:
            if is_sharded(module.parametrizations[weight].original0):
                raise ConversionError(
                    f"{name}.{weight} is sharded: fold a model of one process with the full state dict"
                )
            if not bool(torch.isfinite(getattr(module, weight)).all()):
                raise ConversionError(f"{name}.{weight} is not finite: fold a checkpoint from before the run diverged")
        for _, module, weight in found:
            # deepcopy shares the class that torch made for this module, and folding takes the weight's property off it
            cls = type(module)
            module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
            parametrize.remove_parametrizations(module, weight, leave_parametrized=True)


def weight_normed(module: Any) -> list[str]:
    """Return the names of a module's own weights that have torch's weight norm, and nothing else, on them."""
    if not parametrize.is_parametrized(module):
        return []
    return [
        name
        for name, each in module.parametrizations.items()
        if len(each) == 1 and isinstance(each[0], parametrizations._WeightNorm)
    ]


def _expect_directions(site: Site) -> None:
    if is_sharded(site.weight):
        raise ConversionError(f"{site.name} is sharded already: apply weight norm first, then shard")
    if site.weight.is_meta:
        raise ConversionError(f"{site.name} is on the meta device: give it values first")
    matrix = site.weight.detach().t() if site.transposed else site.weight.detach().flatten(1)
    norms = torch.linalg.vector_norm(matrix, dim=1)
    if not bool((norms > 0).all()) or not bool(torch.isfinite(norms).all()):
        raise ConversionError(
            f"{site.name} has a row that is zero or not finite, which has no direction: initialise it, or choose other "
            "layers"
        )
