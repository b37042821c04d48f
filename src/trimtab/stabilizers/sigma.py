"""`sigma`: sigma-Reparam by name."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from trimtab.errors import ConversionError, RecipeError
from trimtab.reparam import SigmaReparam, remove_norms_, reparametrize_
from trimtab.reparam import fold_ as fold_sigma_
from trimtab.reparam.layers import Reparametrized
from trimtab.reparam.norms import is_norm
from trimtab.reparam.plan import choose
from trimtab.stabilizers.parts import Layers, layers_filter
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer
from trimtab.stabilizers.undo import undone_on_error


@register("sigma")
@dataclass(frozen=True)
class Sigma(Stabilizer):
    """sigma-Reparam: every weight is used as gamma / sigma(W) · W, with one learned gamma for each.

    Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", ICML 2023, arXiv
    2303.06296. It changes every Linear, convolution and attention projection (`trimtab.reparametrize_`), and folds.

    When not to use it: with learning rates low enough that the plain model is stable. With gamma_init=one the best
    learning rate lies several times higher than the plain model's, and low ones train slowly.

    Attributes:
        gamma_init: where gamma starts: "spectral" (sigma(W), which keeps the function), "one" as in the paper, or a
            number.
        layers: which layers: "all", the Transformer's "blocks", or in them "attention" or "mlp".
        blocks: "auto", "one" or "heads": which rows of a weight have a sigma of their own, see `SigmaReparam`.
        vectors: with how many vectors sigma is tracked.
        remove_norms: whether all norm layers are taken out, as in the paper's pure Vision Transformer.
        init_std: if given, the weights meant are drawn anew from N(0, init_std²) first. Under gamma = 1 this sets the
            effective learning rate.
    """

    order = 10

    gamma_init: Literal["spectral", "one"] | float = "spectral"
    layers: Layers = "all"
    blocks: Literal["auto", "one", "heads"] = "auto"
    vectors: int = 4
    remove_norms: bool = False
    init_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_std is not None and self.init_std <= 0:
            raise RecipeError(f"{self.name}: init_std must be positive, got {self.init_std}")
        try:
            self.config()
        except ValueError as error:
            raise RecipeError(f"{self.name}: {error}") from error

    def config(self) -> SigmaReparam:
        """Return the options as `reparametrize_` takes them."""
        return SigmaReparam(gamma_init=self.gamma_init, vectors=self.vectors, blocks=self.blocks)

    def apply_(self, model: nn.Module) -> None:
        """Convert the layers meant."""
        convert_(model, self.config(), self.layers, self.remove_norms, self.init_std)

    def fold_(self, model: nn.Module) -> None:
        """Write gamma / sigma(W) · W into the weights."""
        if is_converted(model):
            fold_sigma_(model)


def is_converted(model: nn.Module) -> bool:
    """Say whether a weight of the model is under sigma-Reparam."""
    return any(isinstance(module, Reparametrized) and bool(module._carried_sizes) for module in model.modules())


def convert_(
    model: nn.Module, config: SigmaReparam, layers: Layers, remove_norms: bool, init_std: float | None
) -> list[nn.Module]:
    """Draw weights anew if asked, convert their layers, and take norms out if asked.

    Returns:
        The converted modules.

    Raises:
        ConversionError: see `reparametrize_`; or there is no norm to take out.
    """
    filter_fn = layers_filter(model, layers)
    sites, attentions = choose(model, config, filter_fn)
    if remove_norms and not any(is_norm(module) for module in model.modules()):
        raise ConversionError("remove_norms finds no norm layer: leave the option out")
    with undone_on_error(model, values=init_std is not None):
        if init_std is not None:
            with torch.no_grad():
                for weight in {id(site.weight): site.weight for site in sites}.values():
                    weight.normal_(std=init_std)
        reparametrize_(model, config, filter_fn)
        if remove_norms:
            remove_norms_(model)
    return [*{id(module): module for module in [*(site.module for site in sites), *attentions]}.values()]
