"""The backward has a short way, in place, where no second derivative follows; it is the same map as the long way."""

import copy
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam.functional import scaled_conv, scaled_linear

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def both_ways(function: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Compare the gradients without and with a graph of their own, of those leaves that want one."""
    output = function(*leaves)
    seed, wanted = random(*output.shape, seed=9), [leaf for leaf in leaves if leaf.requires_grad]
    short = torch.autograd.grad(output, wanted, seed, retain_graph=True)
    long = torch.autograd.grad(output, wanted, seed, create_graph=True)
    assert not any(grad.requires_grad for grad in short)
    assert all(torch.isfinite(grad).all() for grad in short)
    torch.testing.assert_close(short, long, **EXACT)
    again = torch.autograd.grad(output, wanted, seed)  # nothing that was saved has been written to
    torch.testing.assert_close(short, again, rtol=0, atol=0)


def wanting(leaves: list[Tensor], wants: tuple[bool, ...]) -> list[Tensor]:
    return [leaf.requires_grad_(want) for leaf, want in zip(leaves, wants, strict=True)]


WANTS = [wants for wants in product([True, False], repeat=4) if any(wants)]
BLOCKS = {"one": (12,), "even": (2,) * 6, "uneven": (5, 3, 4)}
# (tokens, columns): each makes another of input, weight and output the smallest; and none at all.
SHAPES = {"no-tokens": (0, 6), "few-tokens": (2, 6), "many-tokens": (40, 6), "few-rows": (2, 60)}


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize("gamma_zero", [False, True], ids=["gamma", "gamma-zero"])
@pytest.mark.parametrize("sizes", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_linear(shape: tuple[int, int], sizes: tuple[int, ...], gamma_zero: bool, transposed: bool) -> None:
    tokens, columns = shape
    u, v = random(len(sizes), columns, seed=1), random(12, seed=2)
    gamma = torch.zeros(len(sizes), dtype=torch.float64) if gamma_zero else random(len(sizes), seed=4)

    def function(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
        return scaled_linear(x, weight.t() if transposed else weight, bias, gamma, u, v, sizes)

    for wants in WANTS:
        weight = random(columns, 12) if transposed else random(12, columns)
        both_ways(function, wanting([random(tokens, columns, seed=3), weight, random(12), gamma.clone()], wants))


@pytest.mark.parametrize("gamma_zero", [False, True], ids=["gamma", "gamma-zero"])
@pytest.mark.parametrize("shape", [(0, 4, 5), (1, 4, 3), (9, 4, 7)], ids=str)
def test_convolution(shape: tuple[int, ...], gamma_zero: bool) -> None:
    u, v = random(1, 6, seed=1), random(8, seed=2)
    options = {"stride": (2,), "padding": (1,), "dilation": (1,), "groups": 2}
    gamma = torch.zeros(1, dtype=torch.float64) if gamma_zero else random(1, seed=4)

    def function(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
        return scaled_conv(x, weight, bias, gamma, u, v, **options)

    for wants in WANTS:
        both_ways(function, wanting([random(*shape, seed=3), random(8, 2, 3), random(8), gamma.clone()], wants))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("sizes", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
def test_gradients_are_laid_out_as_their_tensors_are(
    shape: tuple[int, int], sizes: tuple[int, ...], transposed: bool
) -> None:
    """Fused optimisers want it, and a transposing copy would cost as much as the product itself."""
    tokens, columns = shape
    weight = nn.Parameter(random(columns, 12) if transposed else random(12, columns))
    matrix = weight.t() if transposed else weight
    x = random(tokens, columns, seed=3).requires_grad_()
    output = scaled_linear(x, matrix, None, random(len(sizes)), random(len(sizes), columns), random(12), sizes)
    (gradient,) = torch.autograd.grad(output, matrix, torch.ones_like(output))
    assert gradient.stride() == matrix.stride()


def test_a_convolution_with_channels_last_computes_the_same() -> None:
    torch.manual_seed(0)
    conv = tt.reparametrize_(nn.Conv2d(6, 8, 3, padding=1).double())
    last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    x = random(2, 6, 5, 5)
    both = []
    for layer, image in ((conv, x), (last, x.contiguous(memory_format=torch.channels_last))):
        leaf = image.detach().requires_grad_()
        output = layer(leaf)
        output.square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        both.append([output, leaf.grad, *(p.grad for p in layer.parameters()), *layer.state_dict().values()])
    torch.testing.assert_close(*both, check_stride=False, **EXACT)
