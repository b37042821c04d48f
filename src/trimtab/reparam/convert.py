"""sigma-Reparam on a model, in place: on, off, and looked at."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from trimtab.errors import ConversionError
from trimtab.reparam import fastpath
from trimtab.reparam.carried import Start, as_matrix, carried_names, exact_start, is_sharded, memory_of, whole
from trimtab.reparam.classes import carry_, converted_class, drop_, plain_class_of
from trimtab.reparam.config import FilterFn, SigmaReparam
from trimtab.reparam.layers import Reparametrized
from trimtab.reparam.plan import Site, choose
from trimtab.reparam.refresh import refresh_vectors_
from trimtab.reparam.ties import forget_ties_, name_ties_

ModelT = TypeVar("ModelT", bound=nn.Module)


def reparametrize_(model: ModelT, config: SigmaReparam | None = None, filter_fn: FilterFn | None = None) -> ModelT:
    """Put sigma-Reparam on a model's weights, in place: each is used as ``gamma / sigma(W) · W``.

    Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", ICML 2023,
    arXiv 2303.06296. Converted are nn.Linear, nn.Conv1d/2d/3d (flattened to (out, in · kernel)), nn.MultiheadAttention,
    Hugging Face's Conv1D and, on request, nn.Embedding; query, key and value inside one weight each have a sigma of
    their own (see `SigmaReparam`). ``module.weight`` stays the very same Parameter; beside it stands a new one,
    ``gamma``. Build the optimiser after converting, or give it the gammas with ``add_param_group``. The singular
    vectors start exact and take one block power iteration after every step of any torch.optim optimiser that holds
    the weights; for other optimisers, and for averaged weights, call `refresh_`. A model on the meta device may be
    converted too: load a state dict into it, or give its weights values and call ``refresh_(model, exact=True)``.

    Args:
        model: any module; also a single layer.
        config: how, by default ``SigmaReparam()``, which leaves the model's function as it is.
        filter_fn: called with (layer, dotted name) for each layer that holds matrices; only those for which it
            returns True are converted.

    Returns:
        The model.

    Raises:
        ConversionError: if a chosen layer is already converted, of an unknown kind, shared by nothing but layers left
            alone, or has a weight that is zero, not finite or sharded; or if nothing is chosen. The model is then
            exactly as it was.
        TypeError: if the model is not a module or config not a SigmaReparam.
    """
    expect_module(model)
    if config is None:
        config = SigmaReparam()
    if not isinstance(config, SigmaReparam):
        raise TypeError(f"config: expected a SigmaReparam, got {type(config).__name__}; pass filter_fn by name")
    sites, attentions = choose(model, config, filter_fn)
    starts: dict[int, Start] = {}
    by_module: dict[int, tuple[nn.Module, dict[str, Start]]] = {id(module): (module, {}) for module in attentions}
    with torch.inference_mode(False):  # what is made here will be trained
        for site in sites:
            _check_free(site)
            memory = memory_of(site.weight)
            if memory not in starts:
                starts[memory] = _start(site, config)
            by_module.setdefault(id(site.module), (site.module, {}))[1][site.weight_name] = starts[memory]
    for module, _ in by_module.values():
        converted_class(plain_class_of(module))
    # Everything is known to be well: from here on the model changes.
    for module, its_starts in by_module.values():
        carry_(module, its_starts, config)
    fastpath.switch_off_(model)
    name_ties_(model)
    return model


def _check_free(site: Site) -> None:
    taken = [name for name in carried_names(site.weight_name) if hasattr(site.module, name)]
    if taken:
        raise ConversionError(
            f"{site.module_name or 'the model'} already has an attribute {taken[0]!r}, which the converted layer "
            "needs: rename it, or leave the layer out with filter_fn"
        )


def _start(site: Site, config: SigmaReparam) -> Start:
    try:
        if is_sharded(site.weight):
            raise ValueError("it is sharded already: convert (or load) first, then shard")
        start = exact_start(as_matrix(site.weight.detach(), site.transposed), site.sizes, config.vectors)
    except ValueError as error:
        raise ConversionError(f"{site.name} cannot be converted: {error}") from error
    gamma = nn.Parameter(config.first_gamma(start.gamma), requires_grad=site.weight.requires_grad)
    return start._replace(gamma=gamma)


def fold_(model: ModelT) -> ModelT:
    """Make a converted model plain again, in place: every weight becomes ``gamma / sigma(W) · W``.

    The model computes what it did; its classes, parameters and state-dict keys are those of a model that was never
    converted. An optimiser made for the converted model is of no use for the folded one.

    Args:
        model: a converted model.

    Returns:
        The model.

    Raises:
        ConversionError: if nothing in it is converted, or a weight is not finite, sharded, on the meta device, or no
            parameter of its own any more; the model is then as it was.
        TypeError: if the model is not a module.
    """
    converted = _converted(model, "nothing to fold: no layer of this model is converted (or it was folded before)")
    folded: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for name, module in converted:
            for weight_name in module._carried_sizes:
                full_name = f"{name}.{weight_name}".lstrip(".")
                weight = module._parameters.get(weight_name)
                if weight is None:
                    raise ConversionError(
                        f"{full_name} is no parameter of its own any more: take the parametrization (or pruning) off"
                    )
                if is_sharded(weight) or _is_fsdp(model):
                    raise ConversionError(
                        f"{full_name} is sharded: load the full state dict into a converted model of one process and "
                        "fold that"
                    )
                if weight.is_meta:
                    raise ConversionError(f"{full_name} is on the meta device: give it values first")
                if memory_of(weight) in folded:
                    continue
                value = module.scaled(weight_name)
                if not bool(torch.isfinite(value).all()):
                    raise ConversionError(
                        f"{full_name} is not finite once scaled by gamma / sigma: "
                        "fold a checkpoint from before the run diverged"
                    )
                folded[memory_of(weight)] = (weight, value)
        for plain, value in folded.values():
            plain.copy_(value)
    for _, module in converted:
        drop_(module)
    fastpath.restore_(model)
    forget_ties_(model)
    return model


def refresh_(model: ModelT, *, exact: bool = False) -> ModelT:
    """Bring the singular vectors of a converted model up to date with its weights.

    torch.optim optimisers need no such call: their step does it. It serves optimisers that are not, and weights
    written by other means, such as a moving average.

    Args:
        model: a converted model.
        exact: False: one block iteration, as after an optimiser step. True: the exact vectors, as at conversion;
            and, in a model that was converted on the meta device and has its weights now, the gammas that its
            configuration asks for. Layers that hold one Parameter share their gammas again if these are equal: moved
            off the meta device, or loaded by assignment, tied tensors come apart. Weights may be sharded; then every
            process must ask.

    Returns:
        The model.

    Raises:
        ConversionError: if nothing in it is converted, or ``exact`` is asked for a weight that is zero, not finite
            or on the meta device; the vectors are then as they were.
    """
    converted = _converted(model, "nothing to refresh: no layer of this model is converted")
    places = [(name, module, weight_name) for name, module in converted for weight_name in module._carried_sizes]
    if not exact:
        refresh_vectors_(module.carried(weight_name) for _, module, weight_name in places)
        return model
    starts: list[Start] = []
    for name, module, weight_name in places:
        try:
            starts.append(module.exact_start(weight_name))
        except ValueError as error:
            raise ConversionError(f"{name}.{weight_name}".lstrip(".") + f" cannot be refreshed: {error}") from error
    for (_, module, weight_name), start in zip(places, starts, strict=True):
        never_set = bool(whole(module.carried(weight_name).gamma.detach()).isnan().all())
        module.start_(weight_name, start, "config" if never_set else "keep")
    first_gammas: dict[int, nn.Parameter] = {}
    for _, module, weight_name in places:
        gamma_name = carried_names(weight_name)[0]
        weight, gamma = module._parameters.get(weight_name), module._parameters.get(gamma_name)
        if weight is not None and gamma is not None and not is_sharded(gamma):
            first = first_gammas.setdefault(id(weight), gamma)
            module._parameters[gamma_name] = first if torch.equal(first, gamma) else gamma
    return model


def effective_weight(module: nn.Module, name: str | None = None) -> Tensor:
    """Return the weight a layer uses: ``gamma / sigma(W) · W`` if converted, its plain weight otherwise.

    Args:
        module: one layer, converted or plain.
        name: which weight, for layers with several (nn.MultiheadAttention: "in_proj_weight", or "q_proj_weight" ...;
            its output projection is ``effective_weight(module.out_proj)``). By default its only one.

    Returns:
        A tensor of the weight's shape and dtype; differentiable in the trained weight and gamma.

    Raises:
        ValueError: if the layer has no such weight, or several and none is named.
        TypeError: if the module is not a module.
    """
    expect_module(module)
    carried = list(module._carried_sizes) if isinstance(module, Reparametrized) else []
    weights = [key for key, p in module._parameters.items() if p is not None and key.endswith("weight")]
    candidates = carried or weights
    if not weights:
        raise ValueError(f"{type(module).__name__} has no weight of its own: pass one of its layers")
    if name is None and len(candidates) != 1:
        raise ValueError(f"{type(module).__name__} has {len(candidates)} weights {candidates}: pass the name of one")
    chosen = candidates[0] if name is None else name
    if chosen not in weights:
        raise ValueError(f"{type(module).__name__} has no weight {chosen!r}; it has {weights}")
    if isinstance(module, Reparametrized) and chosen in carried:
        return module.scaled(chosen)
    weight: Tensor = getattr(module, chosen)  # under `torch.func.functional_call` no Parameter
    return weight


def _is_fsdp(model: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__)


def _converted(model: nn.Module, complaint: str) -> list[tuple[str, Reparametrized]]:
    expect_module(model)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, Reparametrized)]
    if not any(module._carried_sizes for _, module in found):
        raise ConversionError(complaint)
    return found


def expect_module(model: object) -> None:
    """Raise a TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
