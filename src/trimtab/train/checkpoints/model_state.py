"""The state of a model by its plain names, whatever wraps or shards it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.errors import CheckpointError
from trimtab.reparam.carried import carried_names, cut_like
from trimtab.reparam.layers import Reparametrized
from trimtab.watch.taps.forward import plain_name


def plain_state(model: nn.Module) -> dict[str, Any]:
    """The state dict, by the names that the model would have if nothing had wrapped it; keys in the model's order."""
    plain = plain_name(model)
    return {plain(name): entry for name, entry in model.state_dict().items()}


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The plain names of the parameters, by id."""
    plain = plain_name(model)
    return {id(parameter): plain(name) for name, parameter in model.named_parameters()}


def load_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Load whole tensors by plain names into a model that may be wrapped and sharded."""
    plain = plain_name(model)
    own = {name: entry for name, entry in model.state_dict().items() if plain(name) in saved}
    model.load_state_dict({name: _cut(entry, saved[plain(name)]) for name, entry in own.items()})


def _cut(live: Any, saved: Any) -> Any:
    return cut_like(live, saved.to(live.device)) if isinstance(live, Tensor) else saved


def computed_names(model: nn.Module) -> set[str]:
    """The names of what a converted model computes where a checkpoint has the plain weights alone."""
    plain = plain_name(model)
    return {
        plain(f"{name}.{carried}" if name else carried)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Reparametrized)
        for weight in module._carried_sizes
        for carried in carried_names(weight)
    }


def refuse_other(
    path: Path, what: str, own: Mapping[str, Any], saved: Mapping[str, Any], computed: set[str] | None = None
) -> None:
    """Raise CheckpointError at the first name whose shape or type is another; all of `computed` may be absent."""
    optional = set() if computed is None or computed & saved.keys() else computed
    for name in [*own, *(name for name in saved if name not in own)]:
        here, there = _described(own, name), _described(saved, name)
        if here != there and not (name in optional and name not in saved):
            raise belongs_to_another(path, what, f"{name} is {there} in the file and {here} here")


def _described(entries: Mapping[str, Any], name: str) -> str:
    if name not in entries:
        return "absent"
    entry = entries[name]
    if not isinstance(entry, Tensor):
        return "no tensor"
    return f"{tuple(entry.shape)} {str(entry.dtype).removeprefix('torch.')}"


def belongs_to_another(path: Path, what: str, why: str) -> CheckpointError:
    """The error of a checkpoint that does not fit what it is to be loaded into."""
    return CheckpointError(
        f"the checkpoint {path} belongs to another {what}: {why}. Build everything from the run's own recipe"
    )
