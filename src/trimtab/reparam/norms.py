"""Taking the norm layers out of a model, as in the paper's pure Vision Transformer."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trimtab.errors import ConversionError
from trimtab.reparam import fastpath
from trimtab.reparam.config import FilterFn

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, _NormBase)


def is_norm(module: nn.Module) -> bool:
    """Say whether a module is a norm layer: one of torch's, or one whose class is named ...LayerNorm or ...RMSNorm."""
    return isinstance(module, _NORMS) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def remove_norms_(model: nn.Module, filter_fn: FilterFn | None = None) -> nn.Module:
    """Replace every norm layer of a model by nn.Identity, in place.

    Zhai et al. (arXiv 2303.06296) train Vision Transformers this way, with sigma-Reparam on every weight. Without
    it, a model that loses its norms will usually not train.

    Args:
        model: any module; its norm layers are found by `is_norm`.
        filter_fn: called with (norm layer, dotted name); only those for which it returns True are replaced.

    Returns:
        The model.

    Raises:
        ConversionError: if there is no norm layer to replace, or the model itself is one; the model is untouched.
        TypeError: if the model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    if is_norm(model):
        raise ConversionError("the model itself is a norm layer: put nn.Identity() in its place instead")
    names = {id(m): name for name, m in model.named_modules()}
    chosen = {id(m) for m in model.modules() if is_norm(m) and (filter_fn is None or filter_fn(m, names[id(m)]))}
    if not chosen:
        raise ConversionError(
            "found no norm layer to remove" + ("" if filter_fn is None else " that filter_fn accepts")
        )
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would skip a second name for the same norm
            if id(child) in chosen:
                setattr(parent, name, nn.Identity())
    fastpath.switch_off_(model)
    return model
