"""Which weights of a model a conversion takes: decided, and every objection raised, before anything is touched."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from trimtab.errors import ConversionError
from trimtab.reparam.blocks import block_sizes, places, rows_and_columns
from trimtab.reparam.carried import is_sharded, memory_of, whole
from trimtab.reparam.classes import mixin_of, plain_class_of
from trimtab.reparam.config import FilterFn, SigmaReparam
from trimtab.reparam.layers import Reparametrized
from trimtab.reparam.multihead import MultiheadAttention, projection_weights
from trimtab.spectral import Sizes

_MATRIX_LAYERS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Site:
    """One weight to convert: its module, that module's dotted name, the weight's name in it, rows of each block."""

    module: nn.Module
    module_name: str
    weight_name: str
    sizes: Sizes

    @property
    def name(self) -> str:
        """Dotted name of the weight."""
        return f"{self.module_name}.{self.weight_name}".lstrip(".")

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in, out)."""
        mixin = mixin_of(type(self.module))
        return mixin is not None and mixin.transposed

    @property
    def weight(self) -> nn.Parameter:
        """The trained weight."""
        parameter = self.module._parameters[self.weight_name]
        assert parameter is not None  # only weights that exist become sites
        return parameter


def choose(
    model: nn.Module, config: SigmaReparam, filter_fn: FilterFn | None
) -> tuple[list[Site], list[nn.MultiheadAttention]]:
    """Return the weights to convert, and the attention modules that need a converted forward for them.

    Raises:
        ConversionError: if a chosen layer is converted already or is of a kind that cannot be, its weight is zero, or
            the blocks asked for do not fit it; or if none is chosen.
    """
    layers = _chosen_layers(model, config, filter_fn)
    sites = list(_sites(model, layers, config))
    if config.blocks == "heads" and sites and not any(site.sizes for site in sites):
        raise ConversionError(
            'blocks="heads" finds no head: no layer chosen is known as a query, key or value projection of a module '
            'that tells its num_heads or head_dim. Use "auto", or a function of (layer, dotted name)'
        )
    shared = shared_with(model, {(id(site.module), site.weight_name) for site in sites})
    kept = [_whole_unless_cut(site) for site in sites if memory_of(site.weight) not in shared]
    if not kept:
        raise ConversionError(_nothing_chosen(sites, shared, filter_fn))
    _expect_agreement(kept)
    kept = _without_zeros(kept, config)
    owners = {id(site.module) for site in kept}
    attentions = [
        module
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        and not isinstance(module, Reparametrized)
        and (id(module) in owners or id(module.out_proj) in owners)
    ]
    for attention in attentions:
        if mixin_of(type(attention)) is not MultiheadAttention:
            raise ConversionError(
                f"{type(attention).__name__} has a forward of its own that reads out_proj.weight past the layer: "
                "leave its out_proj out with filter_fn"
            )
    return kept, attentions


def shared_with(model: nn.Module, chosen: set[tuple[int, str]]) -> dict[int, str]:
    """Return, by its memory, each parameter that a place outside ``chosen`` also holds, with that place's name."""
    inside = {memory_of(p) for m, name, p in _places(model).values() if (id(m), name) in chosen}
    return {
        memory_of(p): dotted
        for dotted, (m, name, p) in _places(model).items()
        if memory_of(p) in inside and (id(m), name) not in chosen
    }


def is_zero(weight: Tensor) -> bool:
    """Say whether all of a weight is zero; of a sharded one every process must ask."""
    if weight.is_meta or weight.numel() == 0 or weight.dtype not in _DTYPES:
        return False
    if is_sharded(weight):
        return bool(whole(weight.detach().abs().sum()) == 0)
    return not bool(weight.any())


def _chosen_layers(model: nn.Module, config: SigmaReparam, filter_fn: FilterFn | None) -> list[tuple[str, nn.Module]]:
    chosen = []
    for name, module in model.named_modules():
        converted = isinstance(module, Reparametrized) and bool(module._carried_sizes)
        if not converted and not _holds_matrices(module, config):
            continue
        if filter_fn is not None and not filter_fn(module, name):
            continue
        if converted:
            raise ConversionError(
                f"{name or 'the model'} is already converted: fold_ it first, or leave it out with filter_fn"
            )
        reason = _cannot(module) or _misses_its_attention(module, model)
        if reason:
            way_out = f". Leave it out: filter_fn=lambda module, name: name != {name!r}" if name else ""
            raise ConversionError(
                f"{name or 'the model'} ({type(module).__name__}) cannot be converted: {reason}{way_out}"
            )
        chosen.append((name, module))
    return chosen


def _sites(model: nn.Module, layers: list[tuple[str, nn.Module]], config: SigmaReparam) -> Iterator[Site]:
    where = places(model)
    for name, module in layers:
        for weight_name in _weight_names(module):
            matrix = rows_and_columns(module, module.get_parameter(weight_name))
            yield Site(module, name, weight_name, block_sizes(module, name, matrix, where.get(id(module)), config))


def _whole_unless_cut(site: Site) -> Site:
    return site if site.sizes else replace(site, sizes=rows_and_columns(site.module, site.weight)[:1])


def _expect_agreement(sites: list[Site]) -> None:
    """Raise if one weight, in two places, would be two matrices or be cut in two ways."""
    first: dict[int, tuple[Site, object]] = {}
    for site in sites:
        step = -1 if site.transposed else 1
        own_layout = (site.weight.shape[::step], site.weight.stride()[::step])
        other, layout = first.setdefault(memory_of(site.weight), (site, own_layout))
        if layout != own_layout:
            raise ConversionError(
                f"{other.name} and {site.name} lie in the same memory, but not as the same matrix, and cannot share a "
                "sigma: give each its own memory, or leave both out with filter_fn"
            )
        if other.sizes != site.sizes:
            raise ConversionError(
                f"{other.name} and {site.name} are one weight, but their blocks would be {other.sizes} and "
                f"{site.sizes}: let blocks be a function that answers the same for both"
            )


def _without_zeros(sites: list[Site], config: SigmaReparam) -> list[Site]:
    zero = {memory: is_zero(site.weight) for memory, site in {memory_of(s.weight): s for s in sites}.items()}
    kept = [site for site in sites if not zero[memory_of(site.weight)]]
    if len(kept) < len(sites) and not config.skip_zero:
        name = next(site.name for site in sites if zero[memory_of(site.weight)])
        raise ConversionError(
            f"{name} cannot be converted: it is zero, so it has no direction to normalise. Initialise it, leave such "
            "weights plain with SigmaReparam(skip_zero=True), or leave it out with filter_fn"
        )
    if not kept:
        raise ConversionError("every weight chosen is zero, and skip_zero leaves those plain: nothing is converted")
    return kept


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    return {
        f"{module_name}.{name}".lstrip("."): (module, name, parameter)
        for module_name, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _holds_matrices(module: nn.Module, config: SigmaReparam) -> bool:
    if isinstance(module, nn.Embedding):
        return config.embeddings
    return isinstance(module, _MATRIX_LAYERS) or mixin_of(plain_class_of(module)) is not None or _is_quantized(module)


def _is_quantized(module: nn.Module) -> bool:
    """Say whether a layer holds its weight in a packed form: torch's own quantised layers, and GPTQ's or AWQ's."""
    packed = any(
        cls.__module__.startswith("torch.") and "quantized" in cls.__module__.split(".") for cls in type(module).__mro__
    )
    return (packed and hasattr(module, "weight")) or "qweight" in module._buffers or "qweight" in module._parameters


def _cannot(module: nn.Module) -> str | None:
    """Say why a layer that holds matrices cannot be converted, or None if it can."""
    if isinstance(module, LazyModuleMixin):
        return "it has no weight yet: run one forward first"
    reason = _cannot_be_trained(module)
    if reason:
        return reason
    if "forward" in module.__dict__:
        return "its forward was replaced on this very object, so the converted one would not be called"
    if isinstance(module, _ConvTransposeNd):
        return "transposed convolutions are not supported"
    if isinstance(module, nn.Bilinear):
        return "it is not supported: it has a matrix for each output, and sigma-Reparam is defined for one"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent layers are not supported: a fused kernel reads their weights and applies them at every step"
    if mixin_of(plain_class_of(module)) is None:
        return "it has a forward of its own, which may read the weight in its own way"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its max_norm rewrites the weight in every forward, which sigma would have to follow"
    if isinstance(module, nn.Embedding) and module.sparse:
        return "its gradient is sparse, and that of sigma touches every row: make it with sparse=False"
    absent = [name for name in _weight_names(module) if module._parameters.get(name) is None]
    if absent:
        return f"its {absent[0]} is not a parameter of its own (a parametrization, pruning or weight norm sits on it)"
    return None


def _cannot_be_trained(module: nn.Module) -> str | None:
    """Say why no gradient step can be taken on a layer's weight, or None if one can."""
    if _is_quantized(module):
        return "it is quantised; convert the model first, then quantise a folded copy"
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.ndim < 2:
            continue
        if parameter.is_inference():
            return f"its {name} was made in torch.inference_mode() and cannot be trained: build the model outside it"
        if parameter.is_complex():
            return f"its {name} is complex, which is not supported"
        if parameter.dtype not in _DTYPES:
            return f"its {name} is quantised ({parameter.dtype}); convert the model first, then quantise a folded copy"
        if type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_sharded(parameter):
            return (
                f"its {name} is no plain tensor but a {type(parameter).__name__}, as quantisation makes them; convert "
                "the model first, then quantise a folded copy"
            )
    return None


def _misses_its_attention(module: nn.Module, model: nn.Module) -> str | None:
    if not isinstance(module, NonDynamicallyQuantizableLinear):  # what nn.MultiheadAttention makes its out_proj of
        return None
    if any(isinstance(m, nn.MultiheadAttention) and m.out_proj is module for m in model.modules()):
        return None
    return "it is the output projection of an attention module, which reads its weight past it: convert that module"


def _weight_names(module: nn.Module) -> list[str]:
    return projection_weights(module) if isinstance(module, nn.MultiheadAttention) else ["weight"]


def _nothing_chosen(sites: list[Site], shared: dict[int, str], filter_fn: FilterFn | None) -> str:
    if sites:
        return (
            f"every weight chosen is shared with a layer that is not ({sites[0].name} with "
            f"{shared[memory_of(sites[0].weight)]}), and shared weights are left alone. An embedding is chosen "
            "along with its head by SigmaReparam(embeddings=True)"
        )
    if filter_fn is not None:
        return "filter_fn accepts no layer that can be converted: it is called with (module, dotted name)"
    return "found no Linear, Conv1d/2d/3d, MultiheadAttention or Conv1D layer to convert"
