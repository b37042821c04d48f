"""A conversion that is refused says why and how else, and leaves the model as it was."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import trimtab as tt
from trimtab.reparam import sigma_gamma

MakeMixed = Callable[..., tuple[Any, Tensor]]


def snapshot(model: nn.Module) -> tuple[str, dict[str, Tensor], list[type], list[int]]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return repr(model), state, [type(m) for m in model.modules()], [id(p) for p in model.parameters()]


def assert_untouched(model: nn.Module, before: tuple[str, dict[str, Tensor], list[type], list[int]]) -> None:
    now = snapshot(model)
    assert now[0] == before[0]
    assert now[2:] == before[2:]
    torch.testing.assert_close(now[1], before[1], rtol=0, atol=0, equal_nan=True)


def test_converting_twice_and_folding_twice_are_errors_that_say_so(mixed: MakeMixed) -> None:
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


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


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


def test_a_refusal_is_the_last_layers_too(mixed: MakeMixed) -> None:
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


@pytest.mark.parametrize("gamma_init", ["two", None, True, float("nan"), float("inf"), [1.0]])
def test_a_gamma_that_is_none_is_refused(gamma_init: object) -> None:
    with pytest.raises(ValueError, match="gamma_init: expected"):
        tt.SigmaReparam(gamma_init=gamma_init)


def test_folding_a_diverged_model_is_refused_and_changes_nothing(mixed: MakeMixed) -> None:
    model, _ = mixed()
    tt.reparametrize_(model)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(tt.ConversionError, match=r"head\.weight is not finite"):
        tt.fold_(model)
    assert_untouched(model, before)


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


def test_describe_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        tt.describe(3)
