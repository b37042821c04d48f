"""Which weights of a model a conversion takes: decided, and every objection raised, before anything is touched."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from trimtab.errors import ConversionError
from trimtab.reparam.carried import memory_of
from trimtab.reparam.classes import mixin_of, plain_class_of
from trimtab.reparam.config import FilterFn
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


def choose(model: nn.Module, filter_fn: FilterFn | None) -> tuple[list[Site], list[nn.MultiheadAttention]]:
    """Return the weights to convert, and the attention modules that need a converted forward for them.

    Raises:
        ConversionError: if a chosen layer is converted already or is of a kind that cannot be, or none is chosen.
    """
    sites: list[Site] = []
    chosen: set[int] = set()
    for name, module in model.named_modules():
        converted = isinstance(module, Reparametrized) and bool(module._carried_sizes)
        if not converted and not _holds_matrices(module):
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
        chosen.add(id(module))
        sites.extend(Site(module, name, weight_name, sizes) for weight_name, sizes in _weights(module))
    shared = shared_with(model, {(id(site.module), site.weight_name) for site in sites})
    kept = [site for site in sites if memory_of(site.weight) not in shared]
    if not kept:
        raise ConversionError(_nothing_chosen(sites, shared, filter_fn))
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


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    return {
        f"{module_name}.{name}".lstrip("."): (module, name, parameter)
        for module_name, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _holds_matrices(module: nn.Module) -> bool:
    quantized = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized"))
    return isinstance(module, _MATRIX_LAYERS) or mixin_of(plain_class_of(module)) is not None or quantized


def _cannot(module: nn.Module) -> str | None:
    """Say why a layer that holds matrices cannot be converted, or None if it can."""
    if "forward" in module.__dict__:
        return "its forward was replaced on this very object, so the converted one would not be called"
    if isinstance(module, LazyModuleMixin):
        return "it has no weight yet: run one forward first"
    if isinstance(module, _ConvTransposeNd):
        return "transposed convolutions are not supported"
    if mixin_of(plain_class_of(module)) is None:
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.MultiheadAttention):
            return "it has a forward of its own, which may read the weight in its own way"
        return "layers of this kind are not supported"
    absent = [name for name, _ in _weights(module) if module._parameters.get(name) is None]
    if absent:
        return f"its {absent[0]} is not a parameter of its own (a parametrization, pruning or weight norm sits on it)"
    return None


def _misses_its_attention(module: nn.Module, model: nn.Module) -> str | None:
    if not isinstance(module, NonDynamicallyQuantizableLinear):  # what nn.MultiheadAttention makes its out_proj of
        return None
    if any(isinstance(m, nn.MultiheadAttention) and m.out_proj is module for m in model.modules()):
        return None
    return "it is the output projection of an attention module, which reads its weight past it: convert that module"


def _weights(module: nn.Module) -> Iterator[tuple[str, Sizes]]:
    if isinstance(module, nn.MultiheadAttention):
        yield from projection_weights(module)
        return
    weight = module._parameters.get("weight")
    if weight is None:
        yield "weight", ()
        return
    mixin = mixin_of(plain_class_of(module))
    yield "weight", (weight.shape[1 if mixin is not None and mixin.transposed else 0],)


def _nothing_chosen(sites: list[Site], shared: dict[int, str], filter_fn: FilterFn | None) -> str:
    if sites:
        return (
            f"every weight chosen is shared with a layer that is not ({sites[0].name} with "
            f"{shared[memory_of(sites[0].weight)]}), and shared weights are left alone"
        )
    if filter_fn is not None:
        return "filter_fn accepts no layer that can be converted: it is called with (module, dotted name)"
    return "found no Linear, Conv1d/2d/3d, MultiheadAttention or Conv1D layer to convert"
