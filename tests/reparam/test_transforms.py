"""torch.func and batched derivatives through converted layers, against autograd through the published definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import trimtab as tt

InUse = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
Function = Callable[..., Tensor]


def conv1d(rows: int) -> nn.Module:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(rows, 6)  # its weight is (in, out)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


KINDS = {"linear": lambda rows: nn.Linear(6, rows), "transposed": conv1d}
BLOCKS: dict[str, Any] = {"one": (12,), "six-heads": (2,) * 6, "uneven": (5, 3, 3)}


def pair(kind: str, sizes: tuple[int, ...], in_use: InUse) -> tuple[Function, Function, list[Tensor]]:
    """Return the converted layer and the definition, both as functions of (x, its parameters), and parameters."""
    torch.manual_seed(0)
    layer = KINDS[kind](sum(sizes)).double()
    plain = KINDS[kind](sum(sizes)).double()
    tt.reparametrize_(layer, tt.SigmaReparam(blocks=lambda module, name: sizes))
    with torch.no_grad():
        layer.gamma.mul_(torch.rand_like(layer.gamma) + 0.5)
    names = [name for name, _ in layer.named_parameters()]

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    def theirs(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(plain, in_use(layer, dict(zip(names, parameters, strict=True))), (x,))

    return ours, theirs, [p.detach().clone() for p in layer.parameters()]


def tokens(count: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def jacobians(function: Function, *leaves: Tensor) -> Any:
    return jacrev(function, tuple(range(len(leaves))))(*leaves)


def jacobians_forward(function: Function, *leaves: Tensor) -> Any:
    return jacfwd(function, tuple(range(len(leaves))))(*leaves)


def jacobians_in_one_backward(function: Function, *leaves: Tensor) -> Any:
    return torch.autograd.functional.jacobian(function, leaves, vectorize=True)


def hessians(function: Function, *leaves: Tensor) -> Any:
    every = tuple(range(len(leaves)))
    return jacrev(jacrev(lambda *a: function(*a).pow(3).sum(), every), every)(*leaves)


def hessians_forward_over_reverse(function: Function, *leaves: Tensor) -> Any:
    return hessian(lambda *a: function(*a).pow(3).sum(), tuple(range(len(leaves))))(*leaves)


def hessians_in_one_backward(function: Function, *leaves: Tensor) -> Any:
    return torch.autograd.functional.hessian(lambda *a: function(*a).pow(3).sum(), leaves, vectorize=True)


def gradients_of_every_sample(function: Function, x: Tensor, *parameters: Tensor) -> Any:
    every = tuple(range(1 + len(parameters)))
    loss = grad(lambda *a: function(*a).pow(3).sum(), every)
    return vmap(loss, (0, *(None,) * len(parameters)))(x, *parameters)


def gradients_of_several_gammas(function: Function, x: Tensor, *parameters: Tensor) -> Any:
    *others, gamma = parameters
    gammas = gamma * torch.tensor([[0.5], [1.0], [-2.0]], dtype=torch.float64)
    every = tuple(range(1 + len(parameters)))
    loss = grad(lambda *a: function(*a).pow(3).sum(), every)
    return vmap(loss, (*(None,) * len(parameters), 0))(x, *others, gammas)


TRANSFORMS = [
    *(jacobians, jacobians_forward, jacobians_in_one_backward),
    *(hessians, hessians_forward_over_reverse, hessians_in_one_backward),
    *(gradients_of_every_sample, gradients_of_several_gammas),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("count", [1, 2, 20])
def test_transform(transform: Function, kind: str, sizes: tuple[int, ...], count: int, in_use: InUse) -> None:
    ours, theirs, parameters = pair(kind, sizes, in_use)
    leaves = (tokens(count), *parameters)
    torch.testing.assert_close(transform(ours, *leaves), transform(theirs, *leaves), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("count", [1, 20])
def test_twice_differentiable(kind: str, sizes: tuple[int, ...], count: int, in_use: InUse) -> None:
    ours, _, parameters = pair(kind, sizes, in_use)
    leaves = [leaf.requires_grad_() for leaf in (tokens(count), *parameters)]
    assert torch.autograd.gradcheck(ours, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, leaves, fast_mode=True)


def test_an_ensemble_of_whole_models_is_trained_at_once(in_use: InUse) -> None:
    """Every member with its own vectors, four to a sigma, which are refreshed in place between the steps."""
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def members() -> list[nn.Sequential]:
        torch.manual_seed(3)
        made = [nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(3)]
        return [tt.reparametrize_(member, tt.SigmaReparam(vectors=4)) for member in made]

    together, alone = members(), members()
    skeleton = together[0]

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), (x,)).square().sum()

    optimizers = [torch.optim.SGD(member.parameters(), lr=0.05) for member in alone]
    for _ in range(5):
        parameters, buffers = stack_module_state(together)
        gradients = vmap(grad(loss))(parameters, buffers)
        for i, (member, other) in enumerate(zip(together, alone, strict=True)):
            optimizers[i].zero_grad()
            other(x).square().sum().backward()
            for name, parameter in other.named_parameters():
                torch.testing.assert_close(gradients[name][i], parameter.grad)
            optimizers[i].step()
            with torch.no_grad():
                for name, parameter in member.named_parameters():
                    parameter.sub_(0.05 * gradients[name][i])
            tt.refresh_(member)  # no optimiser of torch.optim stepped here
    for member, other in zip(together, alone, strict=True):
        torch.testing.assert_close(member.state_dict(), other.state_dict())


# torch has no batching rule for its own fused attention on the CPU, and says so
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_whole_model_of_all_kinds_of_layers(mixed: Callable[..., Any], in_use: InUse) -> None:
    plain, x = mixed(torch.float64)
    model = tt.reparametrize_(mixed(torch.float64)[0], tt.SigmaReparam("one", blocks="heads"))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def ours(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    def theirs(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(plain, in_use(model, parameters), (x.unsqueeze(0),)).square().sum()

    torch.testing.assert_close(grad(ours)(parameters, x[0]), grad(theirs)(parameters, x[0]))
    each = vmap(grad(ours), (None, 0))(parameters, x)
    torch.testing.assert_close(each, vmap(grad(theirs), (None, 0))(parameters, x))
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no forward derivative
        products = [jvp(lambda p, f=f: grad(f)(p, x[0]), (parameters,), (parameters,)) for f in (ours, theirs)]
    torch.testing.assert_close(*products)
