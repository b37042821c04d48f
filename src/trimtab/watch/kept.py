"""What a forward of our own must leave as it was: random states, and what modules keep between forwards."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def random_states_kept(tensors: Iterable[Tensor], seed: int | None = None) -> Iterator[None]:
    """Have the random states afterwards as they were: torch's (CPU, devices of the tensors), Python's and NumPy's.

    Args:
        tensors: on whose devices numbers may be drawn.
        seed: of all of them inside; by default they go on.
    """
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    numpy: Any = sys.modules.get("numpy.random")
    states = random.getstate(), numpy and numpy.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in sorted({device.type for device in devices}):
            if hasattr(getattr(torch, kind, None), "get_rng_state"):
                stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == kind], device_type=kind))
        try:
            if seed is not None:
                random.seed(seed)
                if numpy is not None:
                    numpy.seed(seed % 2**32)  # it takes no more
                torch.default_generator.manual_seed(seed)
                for device in devices:
                    _seed(device, seed)
            yield
        finally:
            random.setstate(states[0])
            if numpy is not None:
                numpy.set_state(states[1])


def _seed(device: torch.device, seed: int) -> None:
    """Seed one device; the others, whose states nobody keeps, stay as they are."""
    kind: Any = getattr(torch, device.type, None)
    if hasattr(kind, "default_generators"):
        kind.default_generators[device.index].manual_seed(seed)
    elif hasattr(kind, "manual_seed"):  # of a kind that there is one device of
        kind.manual_seed(seed)


@contextmanager
def modules_kept(model: nn.Module) -> Iterator[None]:
    """Let the modules hold copies of their buffers for a while, and of tensors and numbers they keep as attributes.

    Afterwards they have their own back, and none that came up meanwhile. Parameters are left alone, and so is what
    hangs in a graph.
    """
    modules = list(model.modules())
    before = [(dict(module._buffers), dict(vars(module))) for module in modules]
    copies: dict[int, Tensor] = {}
    try:
        for module in modules:
            module._buffers.update({name: copied(buffer, copies) for name, buffer in module._buffers.items()})
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and not value.requires_grad:
                    vars(module)[name] = copied(value, copies)
        yield
    finally:
        for module, (buffers, attributes) in zip(modules, before, strict=True):
            _put_back(module._buffers, buffers, set(module._buffers) | set(buffers))
            now = vars(module)
            changed = {name for some in (now, attributes) for name, value in some.items() if _is_number(value)}
            _put_back(now, attributes, changed)


def _put_back(values: dict[str, Any], before: dict[str, Any], names: set[str]) -> None:
    for name in names:
        if name in before:
            values[name] = before[name]
        else:
            values.pop(name, None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | Tensor)


def copied(tensor: Tensor | None, copies: dict[int, Any]) -> Tensor | None:
    """The same copy for the same tensor."""
    if tensor is None:
        return None
    if id(tensor) not in copies:
        copies[id(tensor)] = tensor.detach().clone()
    return copies[id(tensor)]
