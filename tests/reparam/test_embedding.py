"""nn.Embedding with sigma-Reparam against float64 autograd through a lookup in gamma * W / (v^T W u)."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trimtab as tt
from trimtab.reparam import SigmaReparam
from trimtab.reparam.carried import exact_start
from trimtab.reparam.classes import carry_
from trimtab.reparam.embedding import scaled_embedding

ROWS, COLUMNS = 7, 3
INDICES = torch.tensor([[0, 5, 5, 2], [6, 2, 5, 3]])  # 1 and 4 are never looked up
BLOCKS = {"one-block": (7,), "uneven-blocks": (2, 4, 1), "single-rows": (1,) * 7}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 5},
    "by-frequency": {"scale_grad_by_freq": True},
    "both": {"padding_idx": 2, "scale_grad_by_freq": True},
}
all_blocks = pytest.mark.parametrize("sizes", BLOCKS.values(), ids=BLOCKS.keys())
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def leaves_and_vectors(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = random(ROWS, COLUMNS).requires_grad_()
    gamma = random(len(sizes)).abs().add(0.1).requires_grad_()
    return weight, gamma, random(len(sizes), COLUMNS, seed=1), random(ROWS, seed=2)


def table_in_use(
    weight: Tensor, gamma: Tensor, u: Tensor, v: Tensor, sizes: tuple[int, ...], padding_idx: int | None = None
) -> Tensor:
    """The published definition, block by block, left to autograd; the row of padding_idx is a constant."""
    if padding_idx is not None:
        is_constant = (torch.arange(len(weight)) == padding_idx).unsqueeze(1)
        weight = torch.where(is_constant, weight.detach(), weight)
    blocks = zip(weight.split(sizes), gamma, u, v.split(sizes), strict=True)
    return torch.cat([g * part / (left @ part @ right) for part, g, right, left in blocks])


def embedding(dtype: torch.dtype = torch.float64, rows: int = ROWS, **options: Any) -> Any:
    torch.manual_seed(0)
    return nn.Embedding(rows, COLUMNS, **options).to(dtype)


def converted(plain: nn.Module, sizes: tuple[int, ...] | None = None, gamma: float = 1.5) -> Any:
    """The same layer converted, in blocks of any sizes, with a gamma that is not sigma."""
    config = SigmaReparam(embeddings=True)
    start = exact_start(plain.weight.detach(), sizes or (len(plain.weight),), config.vectors)
    layer = copy.deepcopy(plain)
    carry_(layer, {"weight": start._replace(gamma=nn.Parameter(start.gamma * gamma))}, config)
    return layer


@all_blocks
@all_options
def test_output_and_gradients(sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    weight, gamma, u, v = leaves_and_vectors(sizes)
    ours = scaled_embedding(INDICES, weight, gamma, u, v, sizes, **options)
    table = table_in_use(weight, gamma, u, v, sizes, options.get("padding_idx"))
    theirs = F.embedding(INDICES, table, **options)
    torch.testing.assert_close(ours, theirs)
    seed = random(*ours.shape, seed=3)
    our_grads = torch.autograd.grad(ours, [weight, gamma], seed)
    torch.testing.assert_close(our_grads, torch.autograd.grad(theirs, [weight, gamma], seed))
    if "padding_idx" in options:
        assert not our_grads[0][options["padding_idx"]].any()


@all_blocks
@pytest.mark.parametrize("frozen", [None, 0, 1], ids=["all", "no-W", "no-gamma"])
def test_it_is_twice_differentiable(sizes: tuple[int, ...], frozen: int | None) -> None:
    weight, gamma, u, v = leaves_and_vectors(sizes)
    inputs = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((weight, gamma))]

    def function(weight: Tensor, gamma: Tensor) -> Tensor:
        return scaled_embedding(INDICES, weight, gamma, u, v, sizes)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivatives_with_frequencies() -> None:
    weight, gamma, u, v = leaves_and_vectors((ROWS,))

    def function(weight: Tensor, gamma: Tensor) -> Tensor:
        return scaled_embedding(INDICES, weight, gamma, u, v, (ROWS,), scale_grad_by_freq=True)

    assert torch.autograd.gradgradcheck(function, (weight, gamma))


@all_blocks
def test_the_padding_row_is_a_constant_to_second_derivatives_too(sizes: tuple[int, ...]) -> None:
    weight, gamma, u, v = leaves_and_vectors(sizes)
    along = [random(ROWS, COLUMNS, seed=4), random(len(sizes), seed=5)]

    def hessian_product(output: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(output.pow(3).sum(), [weight, gamma], create_graph=True)
        return torch.autograd.grad(sum((g * a).sum() for g, a in zip(grads, along, strict=True)), [weight, gamma])

    ours = hessian_product(scaled_embedding(INDICES, weight, gamma, u, v, sizes, padding_idx=5))
    table = table_in_use(weight, gamma, u, v, sizes, 5)
    torch.testing.assert_close(ours, hessian_product(F.embedding(INDICES, table, padding_idx=5)))
    assert not ours[0][5].any()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_conversion_changes_no_bit(shape: tuple[int, ...], index_dtype: torch.dtype, dtype: torch.dtype) -> None:
    layer = embedding(dtype, **OPTIONS["both"])
    indices = torch.randint(ROWS, shape, dtype=index_dtype, generator=torch.Generator().manual_seed(0))
    expected = layer(indices).detach()
    weight = layer.weight
    tt.reparametrize_(layer, SigmaReparam(embeddings=True))
    torch.testing.assert_close(layer(indices), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):  # embeddings are none of autocast's business
        torch.testing.assert_close(layer(indices), expected, rtol=0, atol=0)
    with torch.no_grad():
        layer.gamma.mul_(1.5)
    output = layer(indices)
    torch.testing.assert_close(output, tt.effective_weight(layer)[indices.long()], rtol=0, atol=0)
    output.float().square().sum().backward()
    assert layer.weight is weight
    assert weight.grad.dtype == dtype
    assert layer.gamma.grad.dtype == torch.promote_types(dtype, torch.float32)
    if not indices.numel():
        assert not weight.grad.any()
        assert not layer.gamma.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@all_blocks
def test_half_precision_rounds_each_gradient_a_few_times(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    layer = converted(embedding(dtype), sizes)
    indices = torch.tensor([6, 2, 0, 3])  # each once: no sums in half precision
    seed = random(4, COLUMNS).to(dtype)
    layer(indices).backward(seed)
    weight, gamma = layer.weight.detach().double(), layer.gamma.detach().double()
    u, v = layer.sigma_u[:, 0].double(), layer.sigma_v.double()
    leaves = [weight.requires_grad_(), gamma.requires_grad_()]
    d_weight, d_gamma = torch.autograd.grad(
        F.embedding(indices, table_in_use(weight, gamma, u, v, sizes)), leaves, seed.double()
    )
    # The terms each entry is a sum of, in absolute value: every rounding is relative to one of them.
    with torch.no_grad():
        products = (seed.double() * weight[indices]).abs().sum(1)
        inner = torch.stack(
            [part.sum() for part in torch.zeros(ROWS).double().index_add(0, indices, products).split(sizes)]
        )
        sigma = torch.stack([left @ w @ r for left, w, r in zip(v.split(sizes), weight.split(sizes), u, strict=True)])
        rank_one = [
            g * i / s**2 * left.abs().outer(r.abs())
            for g, i, s, left, r in zip(gamma, inner, sigma, v.split(sizes), u, strict=True)
        ]
        looked_up = (d_weight + 0).index_fill(0, torch.tensor([1, 4, 5]), 0).abs()
        terms = looked_up + 2 * torch.cat(rank_one)
    eps = torch.finfo(dtype).eps
    assert ((layer.gamma.grad - d_gamma).abs() <= 2 * eps * inner / sigma).all()
    assert ((layer.weight.grad - d_weight).abs() <= 4 * eps * terms + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "second"])
def test_backward_under_autocast_is_in_full_precision(create_graph: bool) -> None:
    layer = converted(embedding(torch.float32), (2, 4, 1))
    loss, leaves = layer(INDICES).square().sum(), [layer.weight, layer.gamma]
    expected = torch.autograd.grad(loss, leaves, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(loss, leaves, create_graph=create_graph)
    torch.testing.assert_close(grads, expected)


def test_gamma_zero_is_an_ordinary_value() -> None:
    layer = converted(embedding(), gamma=0.0)
    layer(INDICES).sum().backward()
    table = tt.effective_weight(converted(embedding(), gamma=1.0)).detach()
    torch.testing.assert_close(layer.gamma.grad, table[INDICES].sum().view(1) / torch.linalg.matrix_norm(table, 2))
    assert not layer.weight.grad.any()


def test_the_padding_row_stays_while_sigma_follows_the_table() -> None:
    layer = embedding(padding_idx=5)
    with torch.no_grad():
        layer.weight[5] = 3.0
    tt.reparametrize_(layer, SigmaReparam(embeddings=True))
    before = layer.sigma_v.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        layer(INDICES).square().mean().backward()
        optimizer.step()
    assert (layer.weight[5] == 3.0).all()
    assert not torch.equal(layer.sigma_v, before)
    sigma = layer.sigma_v @ layer.weight @ layer.sigma_u[0, 0]
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(layer.weight, 2))


@all_options
def test_func_grad_and_vmap_over_an_ensemble_and_over_samples(options: dict[str, Any]) -> None:
    models = [converted(embedding(**options), (3, 4), gamma) for gamma in (0.5, 1.0, 2.0)]
    parameters, buffers = torch.func.stack_module_state(models)
    own = (dict(models[0].named_parameters()), dict(models[0].named_buffers()))

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], indices: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (indices,)).pow(3).sum()

    gradient = torch.func.grad(loss)
    over_models = torch.func.vmap(gradient, (0, 0, None))(parameters, buffers, INDICES)
    over_samples = torch.func.vmap(gradient, (None, None, 0))(*own, INDICES)
    for grads, runs in (
        (over_models, [(m, INDICES) for m in models]),
        (over_samples, [(models[0], i) for i in INDICES]),
    ):
        for i, (model, indices) in enumerate(runs):
            model.zero_grad()
            model(indices).pow(3).sum().backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(grads[name][i], parameter.grad)


@pytest.mark.parametrize("sizes", [(7,), (3, 4)], ids=str)
def test_compiled_whole_it_gives_the_same(sizes: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    layer, twin = (converted(embedding(**OPTIONS["both"]), sizes) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(INDICES), twin(INDICES))
    compiled(INDICES).pow(3).sum().backward()
    twin(INDICES).pow(3).sum().backward()
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def kept_bytes(layer: nn.Module, indices: Tensor) -> int:
    """Bytes kept for backward that were not there before, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(indices).sum()
    for parameter in layer.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


class Made(TorchDispatchMode):
    """Notes how many entries every storage has that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in there:
                self.tensors.append(tensor)  # kept alive, so that no storage is counted for another
        return result

    def of_at_least(self, entries: int) -> int:
        return sum(tensor.numel() >= entries for tensor in self.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [5, 4000])
def test_no_more_is_kept_than_by_the_plain_layer(dtype: torch.dtype, tokens: int) -> None:
    layer, indices = nn.Embedding(500, 16, dtype=dtype), torch.arange(tokens) % 400
    plain = kept_bytes(layer, indices)
    small = 4 * (500 + 16 + 2)  # u, v, gamma, sigma
    assert kept_bytes(converted(layer), indices) <= plain + small


@pytest.mark.parametrize("sizes", [(500,), (250, 250), (100, 400)], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_no_table_is_made_but_the_gradient(sizes: tuple[int, ...], frozen: bool) -> None:
    layer = converted(nn.Embedding(500, 16), sizes)
    layer.weight.requires_grad_(not frozen)
    with Made() as forward:
        output = layer(INDICES)
    assert forward.of_at_least(ROWS) > 0
    assert forward.of_at_least(500 * 16) == 0
    with Made() as backward:
        torch.autograd.grad(output.sum(), [p for p in layer.parameters() if p.requires_grad])
    assert backward.of_at_least(500 * 16) == (0 if frozen else 1)


def test_a_plain_checkpoint_loads_and_fresh_parameters_can_be_drawn() -> None:
    plain, layer = embedding(padding_idx=2), converted(embedding(rows=ROWS, padding_idx=2))
    with torch.no_grad():
        plain.weight.mul_(2)
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer(INDICES), plain(INDICES))
    torch.testing.assert_close(layer.gamma.detach(), torch.linalg.matrix_norm(plain.weight.detach(), 2).view(1))
    layer.reset_parameters()
    assert not layer.weight[2].any()
    assert not torch.equal(layer.weight, plain.weight)
    torch.testing.assert_close(tt.effective_weight(layer), layer.weight)


def test_folding_gives_a_plain_embedding_of_the_same_rows() -> None:
    layer = converted(embedding(padding_idx=2), (3, 4))
    before = layer(INDICES).detach()
    tt.fold_(layer)
    assert type(layer) is nn.Embedding
    assert set(layer.state_dict()) == {"weight"}
    torch.testing.assert_close(layer(INDICES).detach(), before, rtol=0, atol=0)


def test_a_table_of_another_size_is_an_error_that_says_what_to_do() -> None:
    layer = converted(embedding())
    layer.weight = nn.Parameter(random(9, COLUMNS))
    for use in (lambda: layer(INDICES), lambda: tt.fold_(layer), lambda: tt.effective_weight(layer)):
        with pytest.raises(RuntimeError, match="has 9 rows, but had 7 when it was converted: fold_ the model first"):
            use()


def test_indices_out_of_range_are_the_error_of_torch() -> None:
    with pytest.raises(IndexError, match="index out of range"):
        converted(embedding())(torch.tensor([ROWS]))


def test_embeddings_are_converted_on_request_only() -> None:
    model = nn.Sequential(embedding(), nn.Linear(COLUMNS, 2).double())
    tt.reparametrize_(model)
    assert type(model[0]) is nn.Embedding
    both = tt.reparametrize_(tt.fold_(model), SigmaReparam(embeddings=True))
    assert hasattr(both[0], "gamma")
    assert hasattr(both[1], "gamma")
