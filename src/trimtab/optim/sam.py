"""`SAM`: sharpness-aware minimisation over any optimiser of torch's kind."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from trimtab.optim.arguments import Perturbation, check_arguments, check_group, check_optimizer
from trimtab.optim.climb import Kept, climb_, put_back_, uphill
from trimtab.optim.running_statistics import running_statistics_kept
from trimtab.reparam.carried import local
from trimtab.spectral.norms import norms

logger = logging.getLogger("trimtab")


@dataclass
class _Pass:
    """Where a step stands, and how many were skipped."""

    begun: bool = False
    skips: bool = False  # the step that has begun will not be taken
    kept: list[Kept] = field(default_factory=list)
    statistics: ExitStack = field(default_factory=ExitStack)
    skipped_steps: int = 0


class SAM(Optimizer):
    """Sharpness-aware minimisation: each step of an optimiser takes the gradient from the worst point nearby.

    Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, arXiv 2010.01412,
    algorithm 1: the weights w climb to ``w + rho g / |g|``, with g the gradient of all parameters together, the
    gradient there is taken, the weights are put back to the bit, and the optimiser steps with it. Two forwards and
    backwards a step, and one copy of the weights between them. With a closure, which is called twice:

        optimizer = tt.SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-3)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)          # the first pass's

    Or in two calls, the very same step:

        loss_of(model(inputs), targets).backward()
        optimizer.first_step()                  # climbs, and clears the gradients
        loss_of(model(inputs), targets).backward()
        optimizer.second_step()                 # puts back, and steps; `step()` is the same

    - Several micro-batches: as many backwards before each of the two calls.
    - Clipping: before the second call. The first has the same length whatever that of the gradient.
    - `torch.amp.GradScaler`: scale both losses, and end with ``scaler.step(optimizer)`` and ``scaler.update()``. Call
      ``scaler.unscale_(optimizer)`` after the second backward only, if you clip.
    - A first gradient that is zero, and any that is not finite, skips the step: weights and optimiser stay as they
      were, to the bit; `skipped_steps` counts, and the first one is logged.
    - Schedulers, `add_param_group` and `state_dict` work as ever: parameter groups and state are the optimiser's own.
      Its step is the one that torch's hooks see. `torch.distributed.checkpoint` is given `base_optimizer`.

    Args:
        params: parameters, or groups of them, which may have a ``rho`` of their own. A group with rho 0 stays where it
            is; its gradient counts in g.
        optimizer: a class, or a function, that makes the optimiser: called with `params` and `options`.
        rho: radius of the ball, in the units of the weights.
        model: the model that is trained, as it is called. With it, running statistics of BatchNorm are those of the
            first pass alone.
        perturbation: under DistributedDataParallel, the gradient of whose examples is climbed. "synchronised": all
            processes climb along their average. "per-worker": each climbs along that of its own (the paper's
            m-sharpness): with a closure SAM makes the first pass under `model.no_sync`, in two calls do so yourself,
            ``with model.no_sync():``. Shards cannot climb by themselves: not with FSDP2.
        options: of the optimiser.

    Attributes:
        base_optimizer: the one that steps.

    Raises:
        TypeError: an argument of the wrong kind, or an optimiser that needs a closure itself.
        ValueError: a rho that is no radius, an unknown perturbation, or "per-worker" with sharded parameters.
    """

    needs_closure = True  # the engine gives one
    _step_supports_amp_scaling = True  # a GradScaler always calls `step`, so that weights are put back, and tells us

    # Not Optimizer.__init__: what a torch optimiser holds is the inner one's (see __getattr__), and our own `step`,
    # which is not that of the weights, has no hooks.
    def __init__(
        self,
        params: Iterable[Any],
        optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        *,
        model: nn.Module | None = None,
        perturbation: Perturbation = "synchronised",
        **options: Any,
    ) -> None:
        self._build(params, optimizer, {"rho": rho, "eta": None}, model, perturbation, options)

    def _build(
        self,
        params: Iterable[Any],
        optimizer: Callable[..., Optimizer],
        own: dict[str, Any],
        model: nn.Module | None,
        perturbation: Perturbation,
        options: dict[str, Any],
    ) -> None:
        check_arguments(params, optimizer, model, perturbation)
        check_group(own)
        groups = list(params)
        for group in groups:
            if isinstance(group, dict):
                check_group(group)
        base = optimizer(groups, **options)
        check_optimizer(base, perturbation)
        self.base_optimizer = base
        self._own, self._model, self._perturbation = own, model, perturbation
        self._pass = _Pass()
        self._complete_groups()

    def _complete_groups(self) -> None:
        for group in self.base_optimizer.param_groups:
            for name, value in self._own.items():
                group.setdefault(name, value)

    def __getattr__(self, name: str) -> Any:
        """Groups, state, defaults and hooks are those of the inner optimiser, and whatever else it has."""
        if name == "base_optimizer" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has.

        Raises:
            RuntimeError: a step has begun.
        """
        self._refuse_if_begun("copied")
        return {name: self.__dict__[name] for name in ("base_optimizer", "_own", "_model", "_perturbation", "_pass")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped."""
        return self._pass.skipped_steps

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at the perturbed point, between the two passes."""
        return bool(self._pass.kept)

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb along the gradients, which are cleared, and wait for those of the second pass.

        Raises:
            RuntimeError: a step has begun already.
        """
        self._refuse_if_begun("begun again")
        directions, length = uphill(self.param_groups)
        reason = self._reason_to_skip(length)
        self._pass.begun, self._pass.skips = True, reason is not None
        if reason is not None:
            self._skip(f"the gradient is {reason}")
        else:
            self._pass.kept = climb_(directions, length)
            if self._model is not None:
                self._pass.statistics.enter_context(running_statistics_kept(self._model))
        self.zero_grad()

    def second_step(self) -> None:
        """Put the weights back and step with the gradients of the second pass.

        Raises:
            RuntimeError: no step has begun.
        """
        self.step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a whole step with a closure; without one, end what `first_step` began.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss. It is called twice,
                with gradients enabled; once where the first gradient skips the step.

        Returns:
            The loss of the first pass; None without a closure.

        Raises:
            RuntimeError: no step has begun, or, with a closure, one has; or a GradScaler brings a closure.
        """
        if closure is not None:
            return self._whole_step(closure)
        if not self._pass.begun:
            raise RuntimeError(
                "step() without a closure ends what first_step() began, and nothing has: call step(closure), or "
                "first_step() after the first backward"
            )
        skips = self._pass.skips
        self.restore()
        if skips:
            return None
        if not self._made_finite():
            self._skip("the gradient at the perturbed weights is not finite")
            return None
        self.base_optimizer.step()
        return None

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back, and forget about the step that has begun; without one, do nothing."""
        put_back_(self._pass.kept)
        self._pass.kept, self._pass.begun, self._pass.skips = [], False, False
        self._pass.statistics.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have a rho of its own."""
        check_group(param_group)
        self.base_optimizer.add_param_group(param_group)
        self._complete_groups()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's, whose groups tell rho, and the number of skipped steps."""
        return {**self.base_optimizer.state_dict(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, or that of the inner optimiser alone; rho is then kept.

        Raises:
            RuntimeError: a step has begun.
        """
        self._refuse_if_begun("loaded into")
        before = [{name: group[name] for name in self._own} for group in self.base_optimizer.param_groups]
        self.base_optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "skipped_steps"})
        for group, own in zip(self.base_optimizer.param_groups, before, strict=True):
            for name, value in own.items():
                group.setdefault(name, value)
        self._pass.skipped_steps = state_dict.get("skipped_steps", 0)

    def _whole_step(self, closure: Callable[[], Any]) -> Any:
        self._refuse_if_begun("taken with a closure")
        if hasattr(self, "found_inf"):
            raise RuntimeError("a GradScaler and a closure do not go together: use first_step() and scaler.step()")
        try:
            with torch.enable_grad(), self._unsynchronised():
                loss = closure()
            self.first_step()
            if not self._pass.skips:
                with torch.enable_grad():
                    closure()
            self.step()
        finally:
            self.restore()
        return loss

    @contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        """Gradients of the first pass stay in their process, if that is what is climbed."""
        if self._perturbation == "synchronised" or _processes() == 1:
            yield
            return
        if not isinstance(self._model, nn.parallel.DistributedDataParallel):
            raise RuntimeError(
                'step(closure) with perturbation="per-worker" needs the DistributedDataParallel model: '
                "SAM(..., model=model)"
            )
        with self._model.no_sync():
            yield

    def _reason_to_skip(self, length: float) -> str | None:
        """Why a gradient of some length is no direction; the same in all processes."""
        broken, moves = not math.isfinite(length), length != 0
        if self._perturbation == "per-worker" and _processes() > 1:
            device = next(p.device for group in self.param_groups for p in group["params"])
            flags = torch.tensor([broken, moves], dtype=torch.int32, device=device)
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=getattr(self._model, "process_group", None))
            broken, moves = (bool(flag) for flag in flags.tolist())
        return "not finite" if broken else None if moves else "zero, or there is none"

    def _made_finite(self) -> bool:
        """Take a GradScaler's scale out of the gradients; say whether they are finite numbers."""
        gradients = [p.grad.detach() for group in self.param_groups for p in group["params"] if p.grad is not None]
        scale = getattr(self, "grad_scale", None)
        parts = [gradient._values() if gradient.is_sparse else local(gradient) for gradient in gradients]
        if scale is not None and parts:
            torch._foreach_mul_(parts, 1.0 / float(scale))
        finite = bool(norms(gradients).isfinite().all())  # of shards every process asks, whatever its own hold
        return finite and not bool(getattr(self, "found_inf", False))

    def _skip(self, reason: str) -> None:
        self._pass.skipped_steps += 1
        if self._pass.skipped_steps == 1:
            logger.warning(
                "SAM skips a step, because %s; weights and optimiser stay as they were. Further ones are counted, in "
                "`skipped_steps`, without a word. (A GradScaler finds its scale by some of them.)",
                reason,
            )

    def _refuse_if_begun(self, what: str) -> None:
        if self._pass.begun:
            raise RuntimeError(
                f"a step has begun and cannot be {what}: end it with second_step(), or give it up with restore()"
            )


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
