"""What a conversion takes, what it leaves and what it refuses, all of it before the model is touched."""

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import SigmaReparam, sigma_gamma


def snapshot(model: nn.Module) -> Any:
    """All that a conversion could change, with the very parameters."""
    return (
        [(name, type(m), sorted(m.__dict__), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        [(name, p, p._version) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, b) for name, b in model.named_buffers(remove_duplicate=False)],
    )


def assert_refused(model: nn.Module, message: str, config: SigmaReparam | None = None, filter_fn: Any = None) -> None:
    """Converting raises an error with this text, and the model is what it was, to the last attribute."""
    modules, parameters, buffers = snapshot(model)
    with pytest.raises(tt.ConversionError, match=message):
        tt.reparametrize_(model, config, filter_fn)
    assert snapshot(model)[0] == modules
    for before, now in zip((parameters, buffers), snapshot(model)[1:], strict=True):
        assert [entry[0] for entry in now] == [entry[0] for entry in before]
        assert all(a[1] is b[1] and a[2:] == b[2:] for a, b in zip(before, now, strict=True))


def left(model: nn.Module, name: str) -> str:
    """Return what `describe` says of one weight."""
    return next(line.split("  ")[-1].strip() for line in tt.describe(model).splitlines() if line.startswith(name + " "))


class Bag(nn.Module):
    """Token embedding, body and head; optionally tied."""

    def __init__(self, tie: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, **options)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


IDS = torch.tensor([[0, 3, 3], [10, 2, 7]])


# --- embeddings ---------------------------------------------------------------------------------------------------


def test_embeddings_are_not_even_offered_unless_asked_for() -> None:
    for embeddings, expected in ((False, ["body", "head"]), (True, ["embed", "body", "head"])):
        seen: list[str] = []

        def everything(module: nn.Module, name: str, seen: list[str] = seen) -> bool:
            seen.append(name)
            return True

        model = tt.reparametrize_(Bag(), SigmaReparam(embeddings=embeddings), everything)
        assert seen == expected
        assert list(sigma_gamma(model)) == [f"{name}.weight" for name in expected]


@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_asked_for(tie: bool) -> None:
    torch.manual_seed(0)
    model = Bag(tie).double()
    before = model(IDS)
    tt.reparametrize_(model, SigmaReparam(embeddings=True))
    torch.testing.assert_close(model(IDS), before)
    assert (model.embed.gamma is model.head.gamma) == tie
    with torch.no_grad():
        model.embed.gamma.mul_(1.5)
    embedded = F.embedding(IDS, tt.effective_weight(model.embed))
    expected = F.linear(torch.tanh(model.body(embedded)), tt.effective_weight(model.head))
    torch.testing.assert_close(model(IDS), expected)
    assert (expected - before).abs().max() > 1e-2
    model.zero_grad()
    model(IDS).square().sum().backward()
    assert model.embed.gamma.grad.abs() > 0
    y = model(IDS)
    tt.fold_(model)
    torch.testing.assert_close(model(IDS), y)
    assert (model.head.weight is model.embed.weight) == tie


def test_half_of_a_tied_pair_is_left_alone() -> None:
    model = Bag(tie=True)
    config = SigmaReparam(embeddings=True)
    for half, other in (("embed", "head"), ("head", "embed")):
        message = rf"{half}\.weight with {other}\.weight.*SigmaReparam\(embeddings=True\)"
        assert_refused(model, message, config, lambda module, name, half=half: name == half)
    assert_refused(model, "shared weights are left alone", filter_fn=lambda module, name: name == "head")


def test_the_parts_of_a_tied_pair_must_be_cut_alike() -> None:
    model = Bag(tie=True)
    unlike = SigmaReparam(embeddings=True, blocks=lambda module, name: 11 if name == "embed" else 1)
    assert_refused(model, r"embed\.weight and head\.weight are one weight, but their blocks would be", unlike)
    alike = SigmaReparam(embeddings=True, blocks=lambda module, name: (4, 7) if name != "body" else 1)
    before = model(IDS)
    tt.reparametrize_(model, alike)
    assert model.embed.gamma is model.head.gamma
    assert model.embed.gamma.shape == (2,)
    torch.testing.assert_close(model(IDS), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, r"embed \(Embedding\).*max_norm rewrites the weight in every forward"),
        ({"sparse": True}, r"embed \(Embedding\).*sparse.*sparse=False"),
    ],
)
def test_embeddings_that_cannot_be_converted(options: dict[str, Any], message: str) -> None:
    model = Bag(**options)
    assert_refused(model, message, SigmaReparam(embeddings=True))
    tt.reparametrize_(model, SigmaReparam(embeddings=True), lambda module, name: name != "embed")
    assert "an embedding is read row by row" in left(model, "embed.weight")


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_an_embedding_with_its_own_forward_is_refused() -> None:
    model = Bag()
    model.embed = ScaledEmbedding(11, 6)
    assert_refused(model, r"embed \(ScaledEmbedding\).*forward of its own", SigmaReparam(embeddings=True))


# --- weights that are zero ------------------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """What peft puts in a layer's place: the layer, and two factors of which one starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        base.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(first=LoraLinear(nn.Linear(6, 8)), second=nn.Linear(8, 3)))


def test_the_zero_factor_of_lora_is_named() -> None:
    message = (
        r"first\.lora_B\.default\.weight cannot be converted: it is zero.*SigmaReparam\(skip_zero=True\).*filter_fn"
    )
    assert_refused(adapted(), message)


@pytest.mark.parametrize("way", ["skip", "filter"])
def test_a_model_with_lora_is_converted_around_its_zero_factor(way: str) -> None:
    model = adapted()
    x = torch.randn(4, 6)
    before = model(x)
    if way == "skip":
        tt.reparametrize_(model, SigmaReparam(skip_zero=True))
        assert "first.lora_A.default.weight" in sigma_gamma(model)
    else:
        tt.reparametrize_(model, filter_fn=lambda module, name: "lora" not in name)
    torch.testing.assert_close(model(x), before)
    assert type(model.first.lora_B["default"]) is nn.Linear
    assert left(model, "first.lora_B.default.weight") == "left: it is zero, so it has no direction to normalise"
    assert not model.first.base_layer.gamma.requires_grad  # as its weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert model.first.lora_B["default"].weight.abs().max() > 0
    assert "zero" not in left(model, "first.lora_B.default.weight")


def test_zero_weights_that_are_tied_or_packed() -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=7)
    nn.init.zeros_(attention.k_proj_weight)
    nn.init.zeros_(attention.out_proj.weight)
    query, key, value = torch.randn(3, 1, 8), torch.randn(4, 1, 5), torch.randn(4, 1, 7)
    before = attention(query, key, value)
    assert_refused(attention, r"^k_proj_weight cannot be converted: it is zero")
    tt.reparametrize_(attention, SigmaReparam(skip_zero=True))
    assert sorted(sigma_gamma(attention)) == ["q_proj_weight", "v_proj_weight"]
    torch.testing.assert_close(attention(query, key, value), before)
    model = Bag(tie=True)
    nn.init.zeros_(model.head.weight)
    tt.reparametrize_(model, SigmaReparam(embeddings=True, skip_zero=True))
    assert list(sigma_gamma(model)) == ["body.weight"]


def test_nothing_but_zeros() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    assert_refused(layer, "every weight chosen is zero", SigmaReparam(skip_zero=True))


def test_what_is_not_known_to_be_zero_is_not_skipped() -> None:
    model = nn.Sequential(nn.Linear(3, 2, device="meta"), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.zero_()[1, 1] = float("nan")
    tt.reparametrize_(model, SigmaReparam(skip_zero=True), lambda module, name: name == "0")
    assert model[0].gamma.is_meta
    assert_refused(model, r"1\.weight.*NaN", SigmaReparam(skip_zero=True), lambda module, name: name == "1")


# --- layers of other kinds --------------------------------------------------------------------------------------------


class Int8Linear(nn.Linear):
    """As bitsandbytes': nn.Linear by class, with integers for a weight and a forward of its own."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)


class PackedLinear(nn.Module):
    """As GPTQ's and AWQ's layers: buffers of packed integers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("qweight", "qzeros", "scales"):
            self.register_buffer(name, torch.ones(4, 4, dtype=torch.int32))


class PackedTensor(Tensor):
    """As torchao's: a tensor that stands for something else, and says so to every operation."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "PackedTensor":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(str(function))


def with_weight(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def dynamically_quantized() -> nn.Module:
    return torch.ao.nn.quantized.dynamic.Linear(4, 4)


FOLD_FIRST = "convert the model first, then quantise a folded copy"

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bilinear": (lambda: nn.Bilinear(4, 4, 2), r"\(Bilinear\).*not supported: it has a matrix for each output"),
    "lstm": (lambda: nn.LSTM(4, 4), r"\(LSTM\).*recurrent layers are not supported"),
    "rnn": (lambda: nn.RNN(4, 4, num_layers=2), r"\(RNN\).*recurrent layers are not supported"),
    "gru-cell": (lambda: nn.GRUCell(4, 4), r"\(GRUCell\).*recurrent layers are not supported"),
    "torch-quantised": (dynamically_quantized, f"it is quantised; {FOLD_FIRST}"),
    "packed": (PackedLinear, rf"\(PackedLinear\).*it is quantised; {FOLD_FIRST}"),
    "int8": (Int8Linear, rf"\(Int8Linear\).*quantised \(torch\.int8\); {FOLD_FIRST}"),
    "float8": (
        lambda: with_weight(torch.ones(4, 4).to(torch.float8_e4m3fn)),
        rf"quantised \(torch\.float8_e4m3fn\); {FOLD_FIRST}",
    ),
    "subclass": (
        lambda: with_weight(PackedTensor(torch.ones(4, 4))),
        f"its weight is no plain tensor but a PackedTensor, as quantisation makes them; {FOLD_FIRST}",
    ),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "its weight is complex, which is not supported"),
}


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_layers_that_are_refused_and_the_way_around_them(make: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(OrderedDict(good=nn.Linear(4, 3), inner=nn.ModuleDict({"bad": make()})))
    assert_refused(model, r"inner\.bad .*" + message)
    assert_refused(model, message, filter_fn=lambda module, name: "bad" in name)
    with pytest.raises(tt.ConversionError) as raised:
        tt.reparametrize_(model)
    way_out = re.search(r"filter_fn=(lambda .*)$", str(raised.value))
    assert way_out is not None
    tt.reparametrize_(model, filter_fn=eval(way_out[1]))
    assert list(sigma_gamma(model)) == ["good.weight"]


def test_a_parameter_of_a_class_of_its_own_is_a_plain_tensor_all_the_same() -> None:
    class Marked(nn.Parameter):
        pass

    layer = nn.Linear(4, 3)
    layer.weight = Marked(layer.weight.data)
    weight = layer.weight
    tt.reparametrize_(layer)
    assert layer.weight is weight


# --- shared weights ---------------------------------------------------------------------------------------------------


def test_a_module_in_two_places_is_converted_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": layer, "again": nn.Sequential(layer)})
    tt.reparametrize_(model)
    assert list(sigma_gamma(model)) == ["first.weight"]
    assert model["first"] is model["again"][0]
    assert "converted" in left(model, "first.weight")


def test_one_memory_as_two_different_matrices_is_refused() -> None:
    encoder, decoder = nn.Linear(4, 4), nn.Linear(4, 4)
    decoder.weight = nn.Parameter(encoder.weight.data.t())
    message = r"0\.weight and 1\.weight lie in the same memory, but not as the same matrix"
    assert_refused(nn.Sequential(encoder, decoder), message)
    part = nn.Linear(4, 2)
    part.weight = nn.Parameter(encoder.weight.data[:2])
    assert_refused(nn.Sequential(encoder, part), message)


# --- describe -----------------------------------------------------------------------------------------------------


def test_few_blocks_are_listed_and_many_are_summed_up() -> None:
    layer = nn.Linear(4, 36)
    with torch.no_grad():
        layer.weight.zero_()[torch.arange(36), torch.arange(36) % 4] = torch.arange(1.0, 37.0)
    tt.reparametrize_(layer, SigmaReparam("one", blocks=lambda module, name: 36))
    assert left(layer, "weight") == "converted in 36 blocks: sigma 1 to 36, gamma 1 to 1"
    tt.fold_(layer)
    with torch.no_grad():
        layer.weight.zero_()[[0, 10, 20], 0] = torch.tensor([1.0, 2.0, 3.0])
    tt.reparametrize_(layer, SigmaReparam("one", blocks=lambda module, name: (10, 10, 16)))
    assert left(layer, "weight") == "converted in 3 blocks: sigma 1, 2, 3, gamma 1, 1, 1"


def test_a_block_that_is_not_finite_is_not_hidden_by_the_others() -> None:
    layer = tt.reparametrize_(nn.Linear(4, 12), SigmaReparam(blocks=lambda module, name: 12))
    with torch.no_grad():
        layer.gamma[5] = float("nan")
    assert left(layer, "weight").endswith("gamma nan to nan")


def test_a_converted_model_without_values_is_described() -> None:
    model = tt.reparametrize_(nn.Sequential(nn.Linear(3, 2, device="meta")))
    assert left(model, "0.weight") == "converted: sigma not known on the meta device"
