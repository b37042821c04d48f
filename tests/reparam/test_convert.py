"""Conversion and folding: the function stays, the model is touched only when all is well."""

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import trimtab as tt
from trimtab.reparam import sigma_gamma

RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Mixed(nn.Module):
    """Linear, convolution and attention layers in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, stride=2)
        self.grouped = nn.Conv1d(16, 16, 3, padding=1, groups=4)
        self.volume = nn.Conv3d(1, 2, 2)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.separate = nn.MultiheadAttention(16, 2, kdim=16, vdim=8, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2)  # (B, 16, L)
        x = self.grouped(x).transpose(1, 2)
        x = self.norm(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.separate(x, x, x[..., :8])[0]
        volume = self.volume(x[:, None, None, :4, :4].expand(-1, -1, 2, -1, -1)).mean()
        return self.head(x.mean(1)) * volume


def mixed(dtype: torch.dtype = torch.float32) -> tuple[Mixed, Tensor]:
    torch.manual_seed(0)
    model = Mixed().to(dtype)
    return model, torch.randn(2, 3, 8, 8, dtype=dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def snapshot(model: nn.Module) -> tuple[str, dict[str, Tensor], list[type], list[int]]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return repr(model), state, [type(m) for m in model.modules()], [id(p) for p in model.parameters()]


def assert_untouched(model: nn.Module, before: tuple[str, dict[str, Tensor], list[type], list[int]]) -> None:
    now = snapshot(model)
    assert now[0] == before[0]
    assert now[2:] == before[2:]
    torch.testing.assert_close(now[1], before[1], rtol=0, atol=0, equal_nan=True)


def train_some_steps(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_the_function_stays_through_conversion_training_and_folding(dtype: torch.dtype) -> None:
    model, x = mixed(dtype)
    keys, y = list(model.state_dict()), model(x)
    assert tt.reparametrize_(model) is model
    assert relative(model(x), y) < RELATIVE[dtype]
    train_some_steps(model, x)
    trained = model(x)
    assert relative(trained, y) > 1e-2
    assert tt.fold_(model) is model
    assert relative(model(x), trained) < RELATIVE[dtype]
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == [type(m) for m in Mixed().modules()]
    fresh = Mixed().to(dtype)
    fresh.load_state_dict(model.state_dict())
    assert relative(fresh(x), trained) < RELATIVE[dtype]


@pytest.mark.parametrize("gamma_init", ["one", 1, 2.5])
def test_gamma_may_start_elsewhere(gamma_init: str | float) -> None:
    model, _ = mixed()
    tt.reparametrize_(model, tt.SigmaReparam(gamma_init=gamma_init))
    value = 1.0 if gamma_init == "one" else float(gamma_init)
    for layer in (model.patch, model.head, model.attention.out_proj):
        norm = torch.linalg.matrix_norm(tt.effective_weight(layer).flatten(1), 2)
        assert float(norm.detach()) == pytest.approx(value, rel=1e-5)
        assert layer.gamma.shape == (1,)


@pytest.mark.parametrize("gamma_init", ["two", None, True, float("nan"), float("inf"), [1.0]])
def test_a_gamma_that_is_none_is_refused(gamma_init: object) -> None:
    with pytest.raises(ValueError, match="gamma_init: expected"):
        tt.SigmaReparam(gamma_init=gamma_init)


def test_the_weight_stays_the_same_parameter_and_the_optimiser_its_state() -> None:
    model, x = mixed()
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    tt.reparametrize_(model)
    for name, p in weights.items():
        assert dict(model.named_parameters())[name] is p
        assert "exp_avg" in optimizer.state[p]


def test_a_root_layer_is_converted_and_folded_in_place() -> None:
    layer = nn.Linear(3, 2)
    assert tt.reparametrize_(layer) is layer
    assert "gamma" in dict(layer.named_parameters())
    assert isinstance(layer, nn.Linear)
    assert type(tt.fold_(layer)) is nn.Linear


def test_a_frozen_weight_has_a_frozen_gamma() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    tt.reparametrize_(layer)
    assert not layer.gamma.requires_grad
    layer(torch.randn(1, 3)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_converting_twice_and_folding_twice_are_errors_that_say_so() -> None:
    model, _ = mixed()
    tt.reparametrize_(model)
    before = snapshot(model)
    with pytest.raises(tt.ConversionError, match="patch is already converted: fold_ it first"):
        tt.reparametrize_(model)
    assert_untouched(model, before)
    tt.fold_(model)
    before = snapshot(model)
    with pytest.raises(tt.ConversionError, match="nothing to fold"):
        tt.fold_(model)
    assert_untouched(model, before)


def test_a_filter_picks_by_layer_and_name_and_the_rest_may_follow() -> None:
    model, x = mixed()
    seen: list[str] = []

    def only_head(module: nn.Module, name: str) -> bool:
        seen.append(name)
        return name == "head"

    y = model(x)
    tt.reparametrize_(model, filter_fn=only_head)
    assert list(sigma_gamma(model)) == ["head.weight"]
    assert set(seen) == {
        *("patch", "grouped", "volume", "attention", "attention.out_proj", "separate", "separate.out_proj", "head")
    }
    tt.reparametrize_(model, filter_fn=lambda module, name: name != "head")
    assert relative(model(x), y) < 1e-5
    assert len(sigma_gamma(model)) == 10


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Quiet(nn.Linear):
    """A subclass that leaves forward alone."""


def with_weight(value: float) -> nn.Linear:
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, value)
    return layer


def empty() -> nn.Linear:
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.empty(0, 3))
    return layer


def with_attribute_gamma() -> nn.Linear:
    layer = nn.Linear(3, 2)
    layer.gamma = 1.0
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "zero": (lambda: with_weight(0.0), r"bad\.weight.*is zero.*filter_fn"),
    "nan": (lambda: with_weight(float("nan")), r"bad\.weight.*NaN"),
    "inf": (lambda: with_weight(float("inf")), r"bad\.weight.*inf"),
    "own-forward": (lambda: OwnForward(3, 2), r"bad \(OwnForward\).*forward of its own"),
    "bilinear": (lambda: nn.Bilinear(3, 3, 2), r"bad \(Bilinear\).*not supported"),
    "recurrent": (lambda: nn.LSTM(3, 2), r"bad \(LSTM\).*not supported"),
    "cell": (lambda: nn.GRUCell(3, 2), r"bad \(GRUCell\).*not supported"),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 2), "transposed convolutions"),
    "lazy": (lambda: nn.LazyLinear(2), "run one forward first"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(3, 2)), "bad "),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", 1), "parameter of its own"),
    "empty": (empty, "shape"),
    "name-taken": (with_attribute_gamma, "already has an attribute 'gamma'"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_conversion_leaves_the_model_as_it_was(make: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(OrderedDict(good=nn.Linear(4, 3), bad=make()))
    before_types, before_keys = [type(m) for m in model.modules()], list(model._modules)
    good = copy.deepcopy(model.good.state_dict())
    with pytest.raises(tt.ConversionError, match=message):
        tt.reparametrize_(model)
    assert [type(m) for m in model.modules()] == before_types
    assert list(model._modules) == before_keys
    torch.testing.assert_close(model.good.state_dict(), good, rtol=0, atol=0)
    tt.reparametrize_(model, filter_fn=lambda module, name: name == "good")  # the way out that the message names
    assert list(sigma_gamma(model)) == ["good.weight"]


def test_a_refusal_is_the_last_layers_too() -> None:
    model, _ = mixed()
    nn.init.zeros_(model.head.weight)
    before = snapshot(model)
    with pytest.raises(tt.ConversionError, match=r"head\.weight"):
        tt.reparametrize_(model)
    assert_untouched(model, before)


def test_one_zero_projection_inside_a_packed_weight_is_found() -> None:
    attention = nn.MultiheadAttention(8, 2)
    with torch.no_grad():
        attention.in_proj_weight[8:16] = 0
    with pytest.raises(tt.ConversionError, match=r"in_proj_weight.*is zero"):
        tt.reparametrize_(attention)


@pytest.mark.parametrize(
    ("model", "filter_fn", "message"),
    [
        (nn.Linear(2, 2), lambda m, n: False, "filter_fn accepts no layer"),
        (nn.LayerNorm(2), None, "found no Linear"),
        (nn.Sequential(), None, "found no Linear"),
    ],
)
def test_nothing_to_convert_is_an_error(model: nn.Module, filter_fn: tt.reparam.FilterFn | None, message: str) -> None:
    with pytest.raises(tt.ConversionError, match=message):
        tt.reparametrize_(model, filter_fn=filter_fn)


def test_what_is_no_model_or_config_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got Tensor"):
        tt.reparametrize_(torch.zeros(2, 2))
    with pytest.raises(TypeError, match="expected a SigmaReparam, got str"):
        tt.reparametrize_(nn.Linear(2, 2), "one")
    with pytest.raises(TypeError, match="pass filter_fn by name"):
        tt.reparametrize_(nn.Linear(2, 2), lambda m, n: True)
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got dict"):
        tt.fold_({})


def test_a_subclass_without_a_forward_of_its_own_keeps_its_class() -> None:
    layer = tt.reparametrize_(Quiet(3, 2))
    assert isinstance(layer, Quiet)
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)
    assert type(tt.fold_(layer)) is Quiet


def test_weights_shared_with_an_embedding_are_left_alone() -> None:
    model = nn.Sequential(OrderedDict(embed=nn.Embedding(7, 4), body=nn.Linear(4, 4), head=nn.Linear(4, 7, bias=False)))
    model.head.weight = model.embed.weight
    tt.reparametrize_(model)
    assert list(sigma_gamma(model)) == ["body.weight"]
    assert model.head.weight is model.embed.weight
    text = tt.describe(model)
    assert "head.weight" in text
    assert "shares its weight with embed.weight" in text
    with pytest.raises(tt.ConversionError, match=r"head\.weight with embed\.weight"):
        tt.reparametrize_(model, filter_fn=lambda m, name: name == "head")


def test_layers_that_share_a_weight_share_gamma_and_vectors_and_fold_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    x = torch.randn(3, 4, dtype=torch.float64)
    y = model(x)
    tt.reparametrize_(model, tt.SigmaReparam("spectral"))
    assert model[0].gamma is model[2].gamma
    assert model[0].sigma_u is model[2].sigma_u
    with torch.no_grad():
        model[0].gamma.mul_(1.5)
    scaled = model(x)
    assert relative(scaled, y) > 1e-2
    twin = copy.deepcopy(model)
    assert twin[0].gamma is twin[2].gamma
    tt.fold_(model)
    assert model[0].weight is model[2].weight
    assert relative(model(x), scaled) < 1e-12


def test_effective_weight_names_what_a_layer_uses() -> None:
    model, _ = mixed()
    assert tt.effective_weight(model.head) is model.head.weight
    tt.reparametrize_(model)
    with torch.no_grad():
        model.head.gamma.fill_(3.0)
    assert float(torch.linalg.matrix_norm(tt.effective_weight(model.head), 2).detach()) == pytest.approx(3, rel=1e-5)
    assert tt.effective_weight(model.attention).shape == (48, 16)
    with pytest.raises(ValueError, match="3 weights"):
        tt.effective_weight(model.separate)
    assert tt.effective_weight(model.separate, "v_proj_weight").shape == (16, 8)
    with pytest.raises(ValueError, match="no weight 'kernel'"):
        tt.effective_weight(model.head, "kernel")
    with pytest.raises(ValueError, match="0 weights"):
        tt.effective_weight(nn.ReLU())


def test_folding_a_diverged_model_is_refused_and_changes_nothing() -> None:
    model, _ = mixed()
    tt.reparametrize_(model)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(tt.ConversionError, match=r"head\.weight is not finite"):
        tt.fold_(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_and_gamma_stay_float32_when_the_model_is_cast(cast: torch.dtype) -> None:
    model, _ = mixed()
    tt.reparametrize_(model)
    model.head(torch.randn(1, 16)).sum().backward()
    model.to(cast)
    assert model.head.weight.dtype == cast
    for tensor in (model.head.gamma, model.head.gamma.grad, model.head.sigma_u, model.attention.in_proj_sigma_v):
        assert tensor.dtype == torch.float32
    assert model.head(torch.randn(1, 16, dtype=cast)).dtype == cast
    model.double()
    assert model.head.gamma.dtype == model.head.sigma_u.dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool) -> None:
    model, x = mixed()
    tt.reparametrize_(model)
    train_some_steps(model, x)
    other = tt.reparametrize_(Mixed())
    other.load_state_dict(model.state_dict(), strict=True, assign=assign)
    assert torch.equal(other(x), model(x))
    before = other.head.sigma_u.clone()
    train_some_steps(other, x)  # a replaced Parameter is still followed
    assert not torch.equal(other.head.sigma_u, before)


def test_a_converted_checkpoint_does_not_load_into_a_plain_model() -> None:
    model, _ = mixed()
    tt.reparametrize_(model)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gamma"):
        Mixed().load_state_dict(model.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_loads_into_a_converted_model(assign: bool) -> None:
    plain, x = mixed()
    other = tt.reparametrize_(Mixed(), tt.SigmaReparam("one"))
    other.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    assert relative(other(x), plain(x)) < 1e-5
    sigma, gamma = sigma_gamma(other)["head.weight"]
    assert float(sigma) == pytest.approx(float(torch.linalg.matrix_norm(plain.head.weight.detach(), 2)), rel=1e-5)
    assert float(gamma) == pytest.approx(float(sigma))


def test_a_broken_plain_checkpoint_is_reported() -> None:
    plain, _ = mixed()
    nn.init.zeros_(plain.head.weight)
    with pytest.raises(RuntimeError, match=r"head\.weight comes from a plain checkpoint: it is zero"):
        tt.reparametrize_(Mixed()).load_state_dict(plain.state_dict())


def test_a_checkpoint_with_part_of_what_is_carried_is_incomplete() -> None:
    model, _ = mixed()
    tt.reparametrize_(model)
    state = model.state_dict()
    del state["head.sigma_u"]
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.sigma_u"):
        tt.reparametrize_(Mixed()).load_state_dict(state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_are_followed(how: str) -> None:
    model, x = mixed()
    tt.reparametrize_(model)
    train_some_steps(model, x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x), model(x))
    before = twin.head.sigma_u.clone()
    train_some_steps(twin, x)
    assert not torch.equal(twin.head.sigma_u, before)
    tt.fold_(twin)


def test_the_random_state_is_not_used() -> None:
    model, _ = mixed()
    state = torch.get_rng_state()
    tt.reparametrize_(model)
    assert torch.equal(state, torch.get_rng_state())


def test_a_wrong_input_shape_is_reported_by_the_layer() -> None:
    layer = tt.reparametrize_(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="4"):
        layer(torch.randn(2, 5))
    conv = tt.reparametrize_(nn.Conv2d(3, 4, 2))
    with pytest.raises(ValueError, match=r"expected input of shape \(B, C, 2 spatial sizes\)"):
        conv(torch.randn(5))


# --- Faults found by using it: each was once wrong, silently or with an obscure message ------------------------------


def gammas_(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.mul_(factor)


def test_tied_layers_stay_in_step_after_a_cast() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    tt.reparametrize_(model).double()  # torch moves buffers module by module, which unties them
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(16, 8, dtype=torch.float64)
    for _ in range(10):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert torch.equal(model[0].sigma_u, model[2].sigma_u)
    y = model(x)
    tt.fold_(model)
    assert relative(model(x), y) < 1e-12


def test_two_parameters_in_one_memory_are_one_weight() -> None:
    embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight.data = embed.weight.data
    with pytest.raises(tt.ConversionError, match="shared weights are left alone"):
        tt.reparametrize_(nn.Sequential(embed, head))
    twins = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    twins[1].weight.data = twins[0].weight.data
    tt.reparametrize_(twins)
    gammas_(nn.Sequential(twins[0]), 1.5)
    x = torch.randn(3, 4, dtype=torch.float64)
    y = twins(x)
    assert relative(tt.fold_(twins)(x), y) < 1e-12


class OwnConvForward(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(input, weight, bias)


def test_a_convolution_with_its_own_conv_forward_is_refused() -> None:
    with pytest.raises(tt.ConversionError, match="forward of its own"):
        tt.reparametrize_(nn.Sequential(nn.Linear(2, 2), OwnConvForward(3, 4, 2)))


def test_a_forward_replaced_on_the_object_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    with pytest.raises(tt.ConversionError, match="replaced on this very object"):
        tt.reparametrize_(model)


class Demanding(nn.Linear):
    def __init_subclass__(cls, *, tag: int, **options: object) -> None:
        super().__init_subclass__(**options)


def test_a_class_that_cannot_be_subclassed_is_found_out_before_anything_is_touched() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Demanding(3, 3))
    before = snapshot(model)
    with pytest.raises(TypeError, match="tag"):
        tt.reparametrize_(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("inside", [prune.l1_unstructured, None], ids=["pruning", "parametrization"])
def test_folding_below_a_parametrization_put_on_later_is_refused(inside: Callable[..., object] | None) -> None:
    model = tt.reparametrize_(nn.Sequential(nn.Linear(4, 4)))
    if inside is None:
        parametrizations.weight_norm(model[0])
    else:
        inside(model[0], "weight", 0.3)
    with pytest.raises(tt.ConversionError, match=r"0\.weight is no parameter of its own any more"):
        tt.fold_(model)


def test_autocast_around_our_calls_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    expected = tt.effective_weight(tt.reparametrize_(copy.deepcopy(plain)))
    x = torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        layer = tt.reparametrize_(copy.deepcopy(plain))
        assert layer.gamma.dtype == torch.float32
        assert torch.equal(tt.effective_weight(layer), expected)
        loss = layer(x).float().square().mean()
    grads = [torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)]
    with torch.autocast("cpu", torch.bfloat16):
        grads.append(torch.autograd.grad(loss, list(layer.parameters())))
        tt.fold_(layer)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=0)


def test_a_model_on_meta_takes_a_plain_checkpoint_by_assignment() -> None:
    plain, x = mixed()
    other = tt.reparametrize_(Mixed()).to("meta")
    other.load_state_dict(plain.state_dict(), assign=True)
    assert relative(other(x), plain(x)) < 1e-5
    assert "gamma" in dict(other.head.named_parameters())


def test_a_half_precision_file_leaves_gamma_and_vectors_in_float32() -> None:
    model = tt.reparametrize_(nn.Linear(4, 3))
    state = {key: value.bfloat16() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert model.weight.dtype == torch.bfloat16
    assert model.gamma.dtype == model.sigma_u.dtype == model.sigma_v.dtype == torch.float32
    assert isinstance(model.gamma, nn.Parameter)


def test_another_default_device_does_not_matter() -> None:
    layer = nn.Linear(200, 200)
    with torch.device("meta"):
        tt.reparametrize_(layer)
    assert layer.sigma_u.device.type == "cpu"


def test_conversion_in_inference_mode_can_be_trained() -> None:
    layer = nn.Linear(4, 3)
    with torch.inference_mode():
        tt.reparametrize_(layer)
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.gamma.grad is not None


def test_numbers_of_numpy_are_numbers_and_too_large_ones_are_refused() -> None:
    layer = tt.reparametrize_(nn.Linear(2, 2), tt.SigmaReparam(np.float32(2)))
    assert float(layer.gamma.detach()) == 2
    with pytest.raises(ValueError, match="that float32 can hold"):
        tt.SigmaReparam(1e39)


def test_describe_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        tt.describe(3)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (16, 3), (3, 512), (300, 40), (512, 2048), (4096, 1024)], ids=str)
@pytest.mark.parametrize("rank", ["full", "one"])
def test_sigma_after_conversion_is_the_spectral_norm(shape: tuple[int, int], rank: str) -> None:
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        if rank == "one":
            column, row = (torch.randn(n, generator=generator) for n in shape)
            layer.weight.copy_(torch.outer(column, row))
            expected = (column.norm() * row.norm()).item()
        else:
            layer.weight.normal_(generator=generator)
            expected = torch.linalg.matrix_norm(layer.weight, 2).item()
    sigma, gamma = sigma_gamma(tt.reparametrize_(layer))["weight"]
    assert sigma.item() == pytest.approx(expected, rel=1e-4)
    assert gamma.item() == pytest.approx(expected, rel=1e-4)
