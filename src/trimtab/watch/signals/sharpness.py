"""Sharpness: the largest eigenvalue of the Hessian of the loss, raw and as the optimiser sees it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import Optimizer

from trimtab.reparam.carried import is_sharded
from trimtab.watch.kept import modules_kept, random_states_kept
from trimtab.watch.signals.eigenvalue import Product, largest_eigenvalue


class Sharpness(NamedTuple):
    """The largest eigenvalues of the Hessian H, and what the optimiser can bear.

    Above its limit a full-batch run is not stable along the eigenvector; runs hover there ("edge of stability").

    Attributes:
        eigenvalue: largest eigenvalue of H.
        limit: ``2 / lr`` for gradient descent, ``(2 + 2 β) / lr`` with momentum β (Cohen et al., arXiv 2103.00065);
            None where the optimiser is not SGD, or its groups differ.
        preconditioned: largest eigenvalue of ``P^-1/2 H P^-1/2``, with ``P = diag(sqrt(v̂) + eps)`` of Adam's
            bias-corrected second moments v̂; None without them.
        preconditioned_limit: ``(2 + 2 β1) / ((1 - β1) lr)``, 38 / lr at β1 = .9 (Cohen et al., arXiv 2207.14484).
        iterations: Hessian-vector products taken, of both together.
        residual: the larger of the relative residuals ``|H x - λ x| / |λ|``: some eigenvalue lies that near.
    """

    eigenvalue: float
    limit: float | None
    preconditioned: float | None
    preconditioned_limit: float | None
    iterations: int
    residual: float


def sharpness(
    closure: Callable[[], Tensor],
    params: Iterable[Tensor],
    *,
    optimizer: Optimizer | None = None,
    model: nn.Module | None = None,
    iterations: int = 50,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Sharpness:
    """Measure the sharpness of a loss by Lanczos on Hessian-vector products, without any effect on training.

    The closure is called once; every product is one backward through the gradient it leaves, so dropout masks and
    batch are the same in all of them. Attention runs through PyTorch's math back-end, the one that can be derived
    twice. Kept as they were: gradients, the random states of torch, Python and NumPy, and, in `model`, buffers and
    attributes that are numbers or tensors.

    Costs one forward, one backward with its graph, and twice a backward for each product; memory for that graph and
    four times the parameters.

    Args:
        closure: returns the loss of one batch, a tensor of one element with its graph; it must not call backward.
        params: the parameters to take the Hessian in; those that need no gradient, or that the loss does not use,
            count as constants.
        optimizer: whose limits are wanted, and whose second moments precondition.
        model: whose buffers and attributes the closure may change, such as running means of BatchNorm.
        iterations: most Hessian-vector products for each eigenvalue.
        tolerance: relative residual at which the iteration ends; the error of the eigenvalue is far smaller, about
            its square times the eigenvalue over the gap.
        seed: of the random numbers the closure draws (by torch, Python's `random` and NumPy's global generator), and
            of the first vector.

    Raises:
        TypeError: the closure returns no tensor.
        ValueError: the loss is no single number or has no graph, the closure calls backward, no parameter is used,
            parameters are sharded, or iterations or tolerance are not positive.
        RuntimeError: an operation in the closure cannot be derived twice (torch's own error).
    """
    if iterations < 1 or not tolerance > 0:
        raise ValueError(f"expected iterations >= 1 and tolerance > 0, got {iterations} and {tolerance}")
    wanted = [p for p in params if p.requires_grad]
    if any(map(is_sharded, wanted)):
        raise ValueError("expected whole parameters, got sharded ones (DTensors), through which nothing derives twice")
    with ExitStack() as stack:
        stack.enter_context(_gradients_kept(wanted))
        if model is not None:
            stack.enter_context(modules_kept(model))
        stack.enter_context(random_states_kept(wanted, seed))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        used, gradients = _gradient(closure, wanted)

        def product(vectors: Sequence[Tensor]) -> list[Tensor]:
            # A gradient that depends on no parameter (the loss is linear there) has no graph, and adds nothing.
            pairs = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g.requires_grad]
            if not pairs:
                return [torch.zeros_like(v) for v in vectors]
            outputs, directions = zip(*((g, v.to(g.dtype)) for g, v in pairs), strict=True)
            found = torch.autograd.grad(outputs, used, directions, retain_graph=True, materialize_grads=True)
            return [each.detach().to(v.dtype) for each, v in zip(found, vectors, strict=True)]

        # The vectors are at least float32, also where parameters are not.
        like = [p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in used]
        raw = largest_eigenvalue(product, like, iterations, tolerance, seed)
        scales = None if optimizer is None else _adam_scales(optimizer, used)
        adam = None
        if scales is not None:
            adam = largest_eigenvalue(_scaled(product, scales), like, iterations, tolerance, seed)
    gd_limit, adam_limit = (None, None) if optimizer is None else limits(optimizer)
    found = [raw] if adam is None else [raw, adam]
    return Sharpness(
        eigenvalue=raw.value,
        limit=gd_limit,
        preconditioned=None if adam is None else adam.value,
        preconditioned_limit=None if adam is None else adam_limit,
        iterations=sum(each.iterations for each in found),
        residual=max(each.residual for each in found),
    )


def limits(optimizer: Optimizer) -> tuple[float | None, float | None]:
    """The sharpness an optimiser can bear: (raw, preconditioned), as the attributes of `Sharpness` tell.

    None for the one that does not apply, and for both where parameter groups differ in what they are made of.
    """
    groups = optimizer.param_groups
    first = {key: _plain(value) for key, value in groups[0].items() if key in ("lr", "momentum", "dampening", "betas")}
    if any(_plain(group.get(key)) != value for group in groups for key, value in first.items()):
        return None, None
    lr = first.get("lr", 0.0)
    if not lr > 0:
        return None, None
    if "betas" in first:
        beta = first["betas"][0]
        return None, (2 + 2 * beta) / ((1 - beta) * lr)
    if "momentum" not in first or not isinstance(optimizer, torch.optim.SGD):
        return None, None
    beta, kept = first["momentum"], 1 - first.get("dampening", 0.0)
    if groups[0].get("nesterov"):
        return (2 + 2 * beta) / ((1 + 2 * beta) * lr), None
    return (2 + 2 * beta) / (lr * (kept if beta else 1)), None


def _plain(value: Any) -> Any:
    """Numbers out of tensors, which optimisers may hold."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Tensor) else value


def _scaled(product: Product, scales: Sequence[Tensor]) -> Product:
    """S H S for a diagonal S."""

    def multiply(vectors: Sequence[Tensor]) -> list[Tensor]:
        inner = product([v * s for v, s in zip(vectors, scales, strict=True)])
        return [v * s for v, s in zip(inner, scales, strict=True)]

    return multiply


def _gradient(closure: Callable[[], Tensor], params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that the loss uses, and its gradient in them with its graph."""
    loss = closure()
    if any(p.grad is not None for p in params):
        raise ValueError("expected a closure that returns the loss without calling backward; this one called it")
    if not isinstance(loss, Tensor):
        raise TypeError(f"expected the closure to return the loss as a tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            "expected the closure to return one number with its graph, got a tensor of shape "
            f"{tuple(loss.shape)} {'with' if loss.requires_grad else 'without'} a graph"
        )
    found = torch.autograd.grad(loss.sum(), params, create_graph=True, allow_unused=True) if params else ()
    pairs = [(p, g) for p, g in zip(params, found, strict=True) if g is not None]
    if not pairs:
        raise ValueError("the loss depends on none of the parameters given: are they those of the model that made it?")
    return [p for p, _ in pairs], [g for _, g in pairs]


@torch.no_grad()
def _adam_scales(optimizer: Optimizer, params: Sequence[Tensor]) -> list[Tensor] | None:
    """``P^-1/2`` for each parameter; None unless the optimiser keeps Adam's second moments of all of them."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scales = []
    for p in params:
        state, group = optimizer.state.get(p, {}), groups.get(id(p), {})
        second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        step = _plain(state.get("step", 0))
        if second is None or second.shape != p.shape or not step or "betas" not in group or "eps" not in group:
            return None
        corrected = second / (1 - group["betas"][1] ** step)
        scales.append((corrected.sqrt() + group["eps"]).rsqrt())
    return scales


@contextmanager
def _gradients_kept(params: Sequence[Tensor]) -> Iterator[None]:
    """Put the gradients aside, so that no backward inside can add to them."""
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in zip(params, before, strict=True):
            p.grad = gradient
