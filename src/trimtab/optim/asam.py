"""`ASAM`: SAM whose ball is as large as the weights are."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trimtab.optim.arguments import Perturbation
from trimtab.optim.sam import SAM


class ASAM(SAM):
    """Adaptive SAM: the ball reaches further along large weights, whatever scale a layer's weights have.

    Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
    ICML 2021, arXiv 2102.11600, algorithm 1: the weights climb to ``w + rho T² g / |T g|`` with T = |w| + eta for each
    entry. A group of parameters with ``eta=None`` has T = 1, as the authors' code has it for biases. All else is as in
    `SAM`; the radius is in other units, and about ten times larger.

    Args:
        params: as for `SAM`; groups may have a ``rho`` and an ``eta`` of their own.
        optimizer: as for `SAM`.
        rho: radius of the ball, relative to the weights.
        eta: keeps weights near zero moving.
        model: as for `SAM`.
        perturbation: as for `SAM`.
        options: of the optimiser.

    Raises:
        TypeError: as `SAM`.
        ValueError: as `SAM`, or an eta that is negative.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer: Callable[..., Optimizer],
        rho: float = 0.5,
        *,
        eta: float = 0.01,
        model: nn.Module | None = None,
        perturbation: Perturbation = "synchronised",
        **options: Any,
    ) -> None:
        self._build(params, optimizer, {"rho": rho, "eta": eta}, model, perturbation, options)
