"""The state of an optimiser by parameter name, so that it fits the same model on any number of processes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.errors import CheckpointError
from trimtab.reparam.carried import cut_like, is_sharded


def optimizer_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Everything an optimiser remembers, as a nest of tensors and plain values.

    Args:
        optimizer: any of torch's kind. Nothing of it is touched: `torch.distributed.checkpoint`'s helpers would have an
            optimiser without a state take a step.
        names: of the parameters, by id.
    """
    state = optimizer.state_dict()
    name_of = dict(zip(_numbers(state), parameter_names(optimizer, names), strict=True))
    groups = [group | {"params": [name_of[i] for i in group["params"]]} for group in state["param_groups"]]
    moments = {name: state["state"][i] for i, name in name_of.items() if i in state["state"]}
    others = {key: entry for key, entry in state["state"].items() if key not in name_of}
    return state | {"class": _class_name(optimizer), "state": moments, "others": others, "param_groups": groups}


def load_optimizer_state(optimizer: Optimizer, saved: Mapping[str, Any], names: Mapping[int, str]) -> None:
    """Give an optimiser back what `optimizer_state` returned; tensors like a sharded parameter are cut like it."""
    numbers = _numbers(optimizer.state_dict())
    number_of = dict(zip(parameter_names(optimizer, names), numbers, strict=True))
    parameters = dict(zip(numbers, _parameters(optimizer), strict=True))
    moments = {
        number_of[name]: {key: _placed(value, parameters[number_of[name]]) for key, value in entries.items()}
        for name, entries in saved["state"].items()
    }
    groups = [group | {"params": [number_of[name] for name in group["params"]]} for group in saved["param_groups"]]
    rest = {name: entry for name, entry in saved.items() if name not in ("class", "others")}
    optimizer.load_state_dict(rest | {"state": saved["others"] | moments, "param_groups": groups})
    # torch casts what it loads to the type of the parameter, which would round moments in float32 of bfloat16 weights,
    # and makes text that of a generator.
    for number, entries in moments.items():
        live = optimizer.state[parameters[number]]
        for key, value in entries.items():
            if not isinstance(value, Tensor):
                live[key] = value
            elif key in live and live[key].dtype != value.dtype:
                live[key] = value.to(live[key].device)


def refuse_other_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], names: Mapping[int, str]) -> None:
    """Raise CheckpointError when a saved state is not that of such an optimiser of such parameters."""
    own, its = _class_name(optimizer), saved["class"]
    if own != its:
        raise CheckpointError(f"it is of {its}, here it is {own}")
    mine = [[names_of(names, p) for p in group["params"]] for group in optimizer.param_groups]
    theirs = [group["params"] for group in saved["param_groups"]]
    if len(mine) != len(theirs):
        raise CheckpointError(f"it has {len(theirs)} parameter groups, here there are {len(mine)}")
    for i, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        for mine_next, theirs_next in zip([*here, "no more"], [*there, "no more"], strict=False):
            if mine_next != theirs_next:
                raise CheckpointError(f"in parameter group {i} it has {theirs_next} where here is {mine_next}")


def parameter_names(optimizer: Optimizer, names: Mapping[int, str]) -> list[str]:
    """The names of an optimiser's parameters, in its order."""
    return [names_of(names, parameter) for parameter in _parameters(optimizer)]


def names_of(names: Mapping[int, str], parameter: Tensor) -> str:
    """The name of a parameter.

    Raises:
        CheckpointError: it has none.
    """
    if id(parameter) not in names:
        raise CheckpointError(
            f"an optimiser holds a parameter of shape {tuple(parameter.shape)} that the model does not have: make the "
            "optimiser from the parameters of the model as it is trained, after it was converted and sharded"
        )
    return names[id(parameter)]


def _class_name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__.removeprefix("Fabric")  # Fabric makes a subclass of that name


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _numbers(state: Mapping[str, Any]) -> list[int]:
    return [i for group in state["param_groups"] for i in group["params"]]


def _placed(value: Any, parameter: Tensor) -> Any:
    """A saved value in memory of its own, cut like the parameter where it is sharded and of its shape."""
    if isinstance(value, list | tuple):
        return type(value)(_placed(entry, parameter) for entry in value)
    if not isinstance(value, Tensor):
        return value
    if is_sharded(parameter) and value.shape == parameter.shape:
        return cut_like(parameter, value.to(parameter.device))
    return value.clone()
