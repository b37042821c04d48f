"""An exponential moving average of the weights, which is what is evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trimtab.reparam import refresh_
from trimtab.reparam.carried import cut_like, is_sharded, local, whole
from trimtab.reparam.layers import Reparametrized


class Average:
    """Keeps ``average = decay * average + (1 - decay) * weights`` for the trained parameters, sharded as they are.

    Args:
        model: on its device; its present weights are where the average starts.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = trained
        self._decay = decay
        # At least float32: a small step would vanish in a smaller type.
        self._shadow = {name: _wide(local(p.detach())).clone() for name, p in trained.items()}

    @torch.no_grad()
    def update_(self) -> None:
        """Move the average towards the weights; call it after every step."""
        weights = [_wide(local(p.detach())) for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._shadow.values()), weights, 1 - self._decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the average for weights, and afterwards its own again; its buffers come back too."""
        buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        own = {name: local(p.detach()).clone() for name, p in self._parameters.items()}
        self.put_(model)
        try:
            yield
        finally:
            self._put(own)
            with torch.no_grad():
                for buffer, kept in buffers:
                    buffer.copy_(kept)

    def put_(self, model: nn.Module) -> None:
        """Give the model the average for weights, for good."""
        self._put(self._shadow)
        if any(isinstance(module, Reparametrized) for module in model.modules()):
            refresh_(model)  # the singular vectors of the averaged weights are others

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            local(p.detach()).copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of the parameters, whole, also when they are sharded."""
        return {name: whole(self._like(name)) for name in self._shadow}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the average back, from whole tensors."""
        for name, kept in self._shadow.items():
            kept.copy_(local(cut_like(self._parameters[name], state[name].to(kept.device))))

    def _like(self, name: str) -> Tensor:
        """The average of one parameter, sharded as it is."""
        parameter, average = self._parameters[name], self._shadow[name]
        if not is_sharded(parameter):
            return average
        from torch.distributed.tensor import DTensor

        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        size, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(average, mesh, placements, run_check=False, shape=size, stride=stride)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
