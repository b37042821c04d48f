"""Gradients of the scaled linear map and convolution against float64 autograd through gamma * W / (v^T W u)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.reparam import reparametrize_
from trimtab.reparam.functional import scaled_conv, scaled_linear


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def explicit_weight(weight: Tensor, gamma: Tensor, u: Tensor, v: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The published definition, block by block, left to autograd."""
    matrix = weight.flatten(1)
    blocks = zip(matrix.split(sizes), gamma, u, v.split(sizes), strict=True)
    return torch.cat([g * part / (left @ part @ right) for part, g, right, left in blocks]).view_as(weight)


# (inputs, columns, rows): each makes another of input, weight and output the smallest, where the scale goes.
LINEAR = {"scale-on-input": (2, 3, 50), "scale-on-weight": (60, 4, 3), "scale-on-output": (2, 40, 3)}


@pytest.mark.parametrize("shape", LINEAR.values(), ids=LINEAR.keys())
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_gradients(shape: tuple[int, int, int], blocks: int, bias: bool) -> None:
    count, columns, rows = shape
    sizes = (rows,) if blocks == 1 else (1, rows - 2, 1)
    x, weight = random(count, columns).requires_grad_(), random(rows, columns).requires_grad_()
    b = random(rows).requires_grad_() if bias else None
    gamma = random(blocks).abs().add(0.1).requires_grad_()
    u, v = random(blocks, columns, seed=1), random(rows, seed=2)
    leaves = [x, weight, gamma] + ([] if b is None else [b])
    ours = scaled_linear(x, weight, b, gamma, u, v, sizes)
    theirs = F.linear(x, explicit_weight(weight, gamma, u, v, sizes), b)
    torch.testing.assert_close(ours, theirs)
    seed = random(*ours.shape, seed=3)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, seed), torch.autograd.grad(theirs, leaves, seed))


CONV = {
    "1d": (nn.Conv1d, {}),
    "2d-strided-padded": (nn.Conv2d, {"stride": 2, "padding": 1}),
    "2d-dilated-no-bias": (nn.Conv2d, {"dilation": 2, "bias": False}),
    "2d-grouped": (nn.Conv2d, {"groups": 2}),
    "2d-same": (nn.Conv2d, {"padding": "same", "dilation": 2}),
    "2d-reflect": (nn.Conv2d, {"padding": 1, "padding_mode": "reflect"}),
    "2d-depthwise": (nn.Conv2d, {"groups": 4}),
    "3d": (nn.Conv3d, {}),
}


@pytest.mark.parametrize(("kind", "options"), CONV.values(), ids=CONV.keys())
@pytest.mark.parametrize("batch", [None, 2], ids=["unbatched", "batched"])
@pytest.mark.parametrize("size", [5, 9])
def test_conv_gradients(kind: type[nn.Conv2d], options: dict[str, object], batch: int | None, size: int) -> None:
    plain = kind(4, 4, 2, **options).double()
    spatial = len(plain.kernel_size)
    x = random(*([] if batch is None else [batch]), 4, *[size] * spatial).requires_grad_()
    converted = reparametrize_(kind(4, 4, 2, **options).double())
    converted.load_state_dict(plain.state_dict())
    with torch.no_grad():
        converted.gamma.mul_(1.7)
    gamma = converted.gamma.detach().clone().requires_grad_()
    weight = plain.weight.detach().clone().requires_grad_()
    in_use = explicit_weight(weight, gamma, converted.sigma_u[:, 0], converted.sigma_v, (4,))
    theirs = torch.func.functional_call(plain, {"weight": in_use}, (x,))
    ours = converted(x)
    torch.testing.assert_close(ours, theirs)
    seed = random(*ours.shape, seed=3)
    torch.testing.assert_close(
        torch.autograd.grad(ours, [x, converted.weight, converted.gamma], seed),
        torch.autograd.grad(theirs, [x, weight, gamma], seed),
    )


@pytest.mark.parametrize("blocks", [(4,), (1, 3)], ids=["one-block", "two-blocks"])
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (3,)], ids=["all", "no-x", "no-W", "no-bias", "no-gamma"])
def test_linear_is_twice_differentiable(blocks: tuple[int, ...], frozen: tuple[int, ...]) -> None:
    u, v = random(len(blocks), 3, seed=5), random(4, seed=6)
    inputs = [random(2, 3), random(4, 3), random(4), random(len(blocks)).abs() + 0.5]
    inputs = [t.requires_grad_(i not in frozen) for i, t in enumerate(inputs)]

    def function(x: Tensor, w: Tensor, b: Tensor, gamma: Tensor) -> Tensor:
        return scaled_linear(x, w, b, gamma, u, v, blocks)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_conv_is_twice_differentiable() -> None:
    u, v = random(1, 8, seed=5), random(2, seed=6)
    inputs = [random(1, 4, 4, 3), random(2, 2, 2, 2), random(2), random(1).abs() + 0.5]
    options = {"stride": (1, 1), "padding": (1, 0), "dilation": (1, 1), "groups": 2}

    def function(x: Tensor, w: Tensor, b: Tensor, gamma: Tensor) -> Tensor:
        return scaled_conv(x, w, b, gamma, u, v, **options)

    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes kept for backward, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum()
    return sum(storages.values())


@pytest.mark.parametrize("tokens", [16, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_weight_sized_is_saved_beside_the_weight(tokens: int, dtype: torch.dtype) -> None:
    layer, x = nn.Linear(256, 512, dtype=dtype), torch.randn(tokens, 256, dtype=dtype, requires_grad=True)
    plain = saved_bytes(layer, x)
    converted = saved_bytes(reparametrize_(layer), x)
    small = 4 * (256 + 512 + 2)  # u, v, gamma, sigma
    assert converted <= plain + small


def test_under_autocast_it_computes_in_bfloat16_and_saves_no_cast_weight() -> None:
    layer, x = nn.Linear(64, 128), torch.randn(10, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
    reparametrize_(layer)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
        assert saved_bytes(layer, x) <= 64 * 128 * 4 + 10 * 64 * 2 + 4 * (64 + 128 + 2)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    got.float().sum().backward()
    assert layer.weight.grad.dtype == layer.gamma.grad.dtype == torch.float32


def test_float64_is_left_alone_by_autocast() -> None:
    layer, x = reparametrize_(nn.Linear(4, 3).double()), random(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float64


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv1d(4, 3, 1)], ids=["linear", "conv"])
def test_another_dtype_without_autocast_is_an_error_as_in_torch(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError):
        layer(x)
    with pytest.raises(RuntimeError, match=r"weight's dtype torch.float32, got torch.bfloat16: cast it, or use auto"):
        reparametrize_(layer)(x)


def test_gamma_zero_is_an_ordinary_value() -> None:
    layer, x = reparametrize_(nn.Linear(4, 3).double()), random(2, 4)
    with torch.no_grad():
        layer.gamma.zero_()
    layer(x).square().sum().backward()
    assert torch.isfinite(layer.gamma.grad).all()
    assert torch.equal(layer.weight.grad, torch.zeros(3, 4, dtype=torch.float64))


def test_func_grad_and_vmap_over_an_ensemble() -> None:
    models = [reparametrize_(nn.Linear(4, 3).double()) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = random(5, 4)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (x,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(parameters, buffers)
    for i, model in enumerate(models):
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name][i], parameter.grad)
