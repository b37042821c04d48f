"""Looking at the sigmas of a converted model: what they are, and how far from the truth."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from trimtab.reparam.carried import Carried, sigma_in_use, true_sigma, whole
from trimtab.reparam.convert import expect_module
from trimtab.reparam.layers import Reparametrized
from trimtab.spectral import sum_blocks


@torch.no_grad()
def sigma_gamma(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (sigma, gamma) of every converted weight by its dotted name, each of shape (blocks,), detached.

    Of sharded weights every process gets all values; every process must ask.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, carried in _converted_weights(model):
        found[name] = (sigma_in_use(carried), whole(carried.gamma.detach()).clone())
    return found


@torch.no_grad()
def stable_ranks(model: nn.Module, sigmas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stable rank ``||W||_F² / sigma²`` of every block of every converted weight by its dotted name, shape (blocks,).

    NaN for a weight that is zero or not finite. Of sharded weights every process gets all values; every process must
    ask.

    Args:
        model: any.
        sigmas: those of `sigma_gamma`, in use, by the same names; shape (blocks,).
    """
    found: dict[str, Tensor] = {}
    for name, carried in _converted_weights(model):
        sigma = sigmas[name]
        rows = torch.linalg.vector_norm(carried.matrix.detach(), dim=1, dtype=sigma.dtype).square()
        found[name] = whole(sum_blocks(rows, carried.sizes)) / sigma.square()
    return found


@torch.no_grad()
def sigma_error(model: nn.Module) -> dict[str, Tensor]:
    """Return ``true sigma / sigma in use - 1`` of every converted weight by its dotted name, each of shape (blocks,).

    The sigma in use is ``v^T W u`` of carried vectors, never above the true one, the exact largest singular value.
    It lags behind while a weight turns quickly; with the error at e, the weight in use has a spectral norm of
    gamma · (1 + e) instead of gamma. The exact value takes an SVD of small weights, some tens of products with large
    ones: something for logging steps, which `trimtab.Watch` does.

    Args:
        model: any; a model without converted layers has no errors. Of sharded weights every process gets all
            values, and every process must ask.

    Returns:
        float32 or float64 tensors; NaN for a weight that is not finite.

    Raises:
        TypeError: if the model is not a module.
    """
    expect_module(model)
    errors: dict[str, Tensor] = {}
    for name, carried in _converted_weights(model):
        estimate = sigma_in_use(carried)
        errors[name] = true_sigma(carried.matrix.detach(), carried.sizes, carried.u).to(estimate) / estimate - 1
    return errors


def _converted_weights(model: nn.Module) -> Iterator[tuple[str, Carried]]:
    for name, module in model.named_modules():
        if isinstance(module, Reparametrized):
            for weight_name in module._carried_sizes:
                carried = module.carried(weight_name)
                if not carried.weight.is_meta:
                    yield f"{name}.{weight_name}".lstrip("."), carried
