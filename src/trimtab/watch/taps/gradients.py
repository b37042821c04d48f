"""A tap on the gradients of micro-batches, for the gradient noise."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from trimtab.reparam.carried import is_sharded
from trimtab.spectral.norms import norms
from trimtab.watch.signals.gradients import GradientNoise, gradient_noise
from trimtab.watch.taps.entries import Entries, recomputes_or_captures

# Sums of floats over processes may differ in their last digits; gradients of different batches differ in the first.
_SAME = 1e-5


class MicroBatches(NamedTuple):
    """What one process saw of the gradients x_1 ... x_n that its n backwards of one step added up.

    Attributes:
        parts: n.
        sum_of_squares: ``|x_1|² + ... + |x_n|²``.
        square_of_sum: squared norm of the gradient after the last of them, before any clipping; under
            DistributedDataParallel it is that of the average over processes.
    """

    parts: int
    sum_of_squares: float
    square_of_sum: float


def noise_of(processes: Sequence[MicroBatches]) -> GradientNoise | None:
    """Gradient noise from what each process saw of one step; pure, so that all who are told the same agree.

    With R processes that average their gradients (they end with the same one), the gradient the optimiser gets is
    ``G = sum of x_ri / R``: the mean of the n R parts ``y_ri = n x_ri``. So everything is in the units of that
    gradient, whether or not the program divides its losses by n. Processes that end with different gradients
    train apart: the mean of their own estimates is returned.

    Returns:
        None where there are fewer than two parts, or processes with different numbers of them.
    """
    count = processes[0].parts if processes else 0
    if count < 1 or any(each.parts != count for each in processes):
        return None
    ends = [each.square_of_sum for each in processes]
    if max(ends) - min(ends) > _SAME * max(ends):
        own = [noise_of([each]) for each in processes]
        told = [each for each in own if each is not None]
        return GradientNoise(*(sum(values) / len(told) for values in zip(*told, strict=True))) if told else None
    parts = count * len(processes)
    if parts < 2:
        return None
    mean_square = count**2 * sum(each.sum_of_squares for each in processes) / parts
    return gradient_noise(mean_square, sum(ends) / len(ends), parts)


class GradientTap:
    """Sees the gradient of each micro-batch on its way into the sum, from its making until `close`.

    Hooks are there on steps that are wanted only, and leave every gradient as it is. Nothing is seen of parameters
    that get their gradients otherwise (FSDP2, tensor parallel, `torch.autograd.grad`), nor of a parameter that gets
    its in several pieces (reentrant checkpointing of layers that share it), nor of a step in which gradients are zeroed
    or changed between backwards (SAM, closures). Under a GradScaler the squares carry the
    square of its scale.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[], bool]) -> None:
        self._model, self._wanted = model, wanted
        self._hooks: list[RemovableHandle] = []  # on parameters, during a step that is wanted
        self._clear()
        self._entries = Entries(model, lambda *_: self._enter(), lambda _: None, lambda *_: self._enter())

    def take(self) -> MicroBatches | None:
        """What was seen since the last time; None where no gradient was, or the parts cannot be told."""
        count = max(self._counts.values(), default=0)
        told = 0 < count <= self._forwards and self._square_of_sum is not None and not self._failed
        told = told and all(torch.equal(*pair) for pair in self._kept)
        squares = torch.stack([square.cpu().double() for square in self._squares]).sum().item() if told else 0.0
        seen = MicroBatches(count, squares, self._square_of_sum or 0.0) if told else None
        self._clear()
        return seen

    def close(self) -> None:
        """Remove every hook."""
        self._clear()
        self._entries.remove()

    def _clear(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._forwards = 0
        self._coming: dict[Tensor, Tensor] = {}
        self._counts: Counter[Tensor] = Counter()
        self._squares: list[Tensor] = []
        self._square_of_sum: float | None = None
        self._sums: dict[Tensor, Tensor] = {}  # squared norm of each gradient after the last backward
        self._kept: list[tuple[Tensor, Tensor]] = []  # the same, and what the next backward found there
        self._backward = -1
        self._failed = False

    def _enter(self) -> None:
        """A forward begins."""
        if recomputes_or_captures() or not torch.is_grad_enabled() or not self._wanted():
            return
        self._forwards += 1
        if self._hooks:
            return
        trained = [p for p in self._model.parameters() if p.requires_grad]
        if all(p.is_leaf and not is_lazy(p) and not is_sharded(p) for p in trained):
            see, added = self._unless_it_fails(self._see), self._unless_it_fails(self._added)
            self._hooks = [p.register_hook(lambda gradient, p=p: see(p, gradient)) for p in trained]
            self._hooks += [p.register_post_accumulate_grad_hook(added) for p in trained]

    def _see(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """A backward has a gradient for a parameter; the hook's None leaves it as it is."""
        self._coming[parameter] = _square(gradient)
        if self._counts[parameter] and torch._C._current_graph_task_id() != self._backward:
            # Where a program has zeroed or changed what the last backward left, the end is not the sum of the parts.
            found = torch.zeros_like(self._sums[parameter]) if parameter.grad is None else _square(parameter.grad)
            self._kept.append((self._sums[parameter], found))

    def _added(self, parameter: Tensor) -> None:
        """It was added to the parameter's; what `torch.autograd.grad` returns to its caller never is."""
        if parameter not in self._coming:
            return
        self._squares.append(self._coming.pop(parameter))
        self._counts[parameter] += 1
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            # After this backward, and after what DistributedDataParallel has put off till then: its averages.
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(self._unless_it_fails(self._see_sum)))

    def _unless_it_fails(self, hook: Callable[..., None]) -> Callable[..., None]:
        def safe(*args: Tensor) -> None:
            try:
                hook(*args)
            except Exception:  # whatever it is: the backward goes on, and this step has no estimate
                self._failed = True

        return safe

    def _see_sum(self) -> None:
        gradients = {p: p.grad for p in self._counts if p.grad is not None}
        self._square_of_sum = float(norms(list(gradients.values())).square().sum())
        self._sums = {p: _square(gradient) for p, gradient in gradients.items()}


@torch.no_grad()
def _square(gradient: Tensor) -> Tensor:
    """Squared norm, shape (), where the gradient is: nothing waits for the device."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    values = torch.view_as_real(values) if values.is_complex() else values
    rows = torch.linalg.vector_norm(
        values.reshape(-1) if values.ndim == 0 else values,
        dim=-1,
        dtype=None if values.dtype == torch.float64 else torch.float32,
    )
    return (rows if rows.device.type == "mps" else rows.double()).square().sum()
