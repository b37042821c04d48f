"""low-rank: the factors, what is refused, and what the other stabilizers and Watch see of them."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stabilizer_case import CLOSE, TRIMTABS, small, step_
from torch import Tensor, nn

from trimtab.attention.low_rank import LowRankAttention, LowRankFused, LowRankLinear
from trimtab.errors import ConversionError, RecipeError
from trimtab.models.vit import Attention, ViTConfig
from trimtab.reparam import sigma_gamma
from trimtab.stabilizers import Stabilizer, fold_, low_rank_, merge_low_rank_, parse, stabilize_
from trimtab.stabilizers.residual import residual_branches
from trimtab.watch import Watch
from trimtab.watch.signals import qk_energies

CHANGING = sorted(
    {name for name, cls in TRIMTABS.items() if cls.apply_ is not Stabilizer.apply_} - {"none", "low-rank"}
)


class Holder(nn.Module):
    """An attention's layers, without its forward."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.num_heads = 2
        for name, layer in layers.items():
            self.add_module(name, layer)


def qkv(width: int = 8, **changes: nn.Module) -> Holder:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
    return Holder(**(layers | changes))


def test_the_best_approximation_and_its_error() -> None:
    """numpy's SVD is the oracle; both factors are equally large."""
    holder = qkv().double()
    plain = {name: layer.weight.detach().numpy().copy() for name, layer in holder.named_children()}
    biases = {name: layer.bias for name, layer in holder.named_children()}
    fits = low_rank_(holder, 3)
    assert [fit.name for fit in fits] == ["query", "key", "value"]
    for fit in fits:
        layer = holder.get_submodule(fit.name)
        assert isinstance(layer, LowRankLinear)
        left, values, right = np.linalg.svd(plain[fit.name])
        expected = left[:, :3] * values[:3] @ right[:3]
        np.testing.assert_allclose((layer.up.weight @ layer.down.weight).detach().numpy(), expected, atol=1e-12)
        assert fit.error == pytest.approx(np.linalg.norm(plain[fit.name] - expected) / np.linalg.norm(plain[fit.name]))
        assert layer.up.weight.detach().norm().item() == pytest.approx(layer.down.weight.detach().norm().item())
        assert layer.up.bias is biases[fit.name]
        assert layer.rank == fit.rank == 3


@pytest.mark.parametrize(("shape", "rank"), [((8, 8), 4), ((9, 9), 4), ((8, 24), 6), ((1, 1), 1)])
def test_by_default_parameters_do_not_grow(shape: tuple[int, int], rank: int) -> None:
    layer = LowRankLinear(shape[1], shape[0])
    assert layer.rank == rank
    assert layer.up.weight.numel() + layer.down.weight.numel() <= max(2, shape[0] * shape[1])


def test_fused_layers_are_factorised_part_by_part() -> None:
    """GPT-2 whose c_attn holds, for each of q, k and v, numpy's best approximation computes the same."""
    example, reference = small("gpt2"), small("gpt2")
    fits = low_rank_(example.model, 4)
    assert [fit.name.rpartition(".")[2] for fit in fits] == ["query", "key", "value"]
    weight: Any = reference.model.get_parameter("transformer.h.0.attn.c_attn.weight")  # (in, out)
    parts = []
    for part in weight.detach().numpy().T.reshape(3, 24, 24):
        left, values, right = np.linalg.svd(part)
        parts.append(left[:, :4] * values[:4] @ right[:4])
    with torch.no_grad():
        weight.copy_(torch.from_numpy(np.concatenate(parts).T))
    torch.testing.assert_close(example.logits(example.model), reference.logits(reference.model), **CLOSE)
    for one in (example, reference):
        one.loss(one.model).backward()
    gradients = {name: p.grad for name, p in example.model.named_parameters() if "c_attn" not in name}
    expected = {name: p.grad for name, p in reference.model.named_parameters() if "c_attn" not in name}
    torch.testing.assert_close(gradients, expected, **CLOSE)


def test_a_fresh_product_has_the_variance_of_the_weight() -> None:
    torch.manual_seed(0)
    holder = Holder(query=nn.Linear(256, 256), key=nn.Linear(256, 256), value=nn.Linear(256, 64))
    stds = [layer.weight.detach().std().item() for layer in holder.children()]
    fits = low_rank_(holder, 32, start="fresh")
    assert all(fit.error is None for fit in fits)
    for layer, std in zip(holder.children(), stds, strict=True):
        # of 16,384 to 65,536 entries that share 32 features the sample deviation strays by 2 %: thrice that is allowed
        assert (layer.up.weight @ layer.down.weight).detach().std().item() == pytest.approx(std, rel=0.06)
    direct = LowRankLinear(256, 256, 32)
    assert (direct.up.weight @ direct.down.weight).detach().std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.06)


def test_dtype_training_mode_and_frozen_weights_stay() -> None:
    holder = qkv().bfloat16().eval()
    holder.get_parameter("key.weight").requires_grad_(False)
    low_rank_(holder)
    assert {p.dtype for p in holder.parameters()} == {torch.bfloat16}
    assert not holder.get_submodule("query.up").training
    frozen = {name for name, p in holder.named_parameters() if not p.requires_grad}
    assert frozen == {"key.up.weight", "key.down.weight"}
    merge_low_rank_(holder)
    assert {name for name, p in holder.named_parameters() if not p.requires_grad} == {"key.weight"}
    assert holder.get_parameter("query.weight").dtype == torch.bfloat16


def test_what_is_shared_stays_shared() -> None:
    first, second = qkv(), qkv()
    second.add_module("query", first.query)
    second.get_submodule("key").weight = first.get_parameter("key.weight")
    model = nn.ModuleList([first, second])
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    assert [fit.name for fit in low_rank_(model, 8)] == ["0.query", "0.key", "0.value", "1.key", "1.value"]
    assert model[0].query is model[1].query
    assert model[0].key is not model[1].key
    assert model[0].key.up.weight is model[1].key.up.weight
    assert model[0].key.down.weight is model[1].key.down.weight
    merge_low_rank_(model)
    assert model[0].query is model[1].query
    assert model[0].key.weight is model[1].key.weight
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_factorised_is_refused_and_nothing_changes() -> None:
    tied = qkv(out=nn.Linear(8, 8))
    tied.get_submodule("out").weight = tied.get_parameter("value.weight")
    zero, infinite, hooked, meta = qkv(), qkv(), qkv(), qkv()
    with torch.no_grad():
        zero.get_parameter("value.weight").zero_()
        infinite.get_parameter("value.weight")[0, 0] = torch.inf
    hooked.get_submodule("value").register_forward_hook(lambda *_: None)
    meta.get_submodule("value").to("meta")
    converted, normed, done = qkv(), qkv(), qkv()
    stabilize_(converted.get_submodule("value"), "sigma")
    torch.nn.utils.parametrizations.weight_norm(converted.get_submodule("key"))
    torch.nn.utils.parametrizations.weight_norm(normed.get_submodule("value"))
    low_rank_(done, 2, filter_fn=lambda layer, name: name == "value")
    cases: list[tuple[nn.Module, str]] = [
        (tied, "value shares its weight with out.weight"),
        (zero, "value is zero"),
        (infinite, "value is not finite"),
        (hooked, "value has hooks"),
        (meta, "value is on the meta device"),
        (converted, "as in low-rank\\+sigma"),
        (normed, "value has sigma-Reparam or another parametrization"),
        (done, "value is of low rank already"),
        (qkv(value=nn.LazyLinear(8)), "value has no weight yet"),
        (qkv(value=nn.Conv1d(8, 8, 1)), "value .*no plain linear layer"),
        (qkv(value=nn.Linear(8, 3)), "value makes the value by \\(3, 8\\): rank 4 is not between 1 and 3"),
        (Holder(query_key_value=nn.Linear(8, 24)), "not known which of its rows"),
        (nn.TransformerEncoderLayer(8, 2), "nn.MultiheadAttention"),
        (nn.Linear(8, 8), "finds no attention"),
    ]
    for model, message in cases:
        before = [(type(module), dict(module._modules), dict(module._parameters)) for module in model.modules()]
        with pytest.raises(ConversionError, match=message):
            low_rank_(model, 4)
        after = [(type(module), dict(module._modules), dict(module._parameters)) for module in model.modules()]
        assert [each[0] for each in after] == [each[0] for each in before]
        for (_, modules, parameters), (_, modules_before, parameters_before) in zip(after, before, strict=True):
            assert {k: id(v) for k, v in modules.items()} == {k: id(v) for k, v in modules_before.items()}
            assert {k: id(v) for k, v in parameters.items()} == {k: id(v) for k, v in parameters_before.items()}


def test_options_and_arguments_out_of_range() -> None:
    with pytest.raises(RecipeError, match="rank must be at least 1"):
        parse("low-rank:rank=0")
    with pytest.raises(ValueError, match="rank of 1 to 4"):
        LowRankLinear(4, 6, 5)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        LowRankAttention(6, 4)
    with pytest.raises(ConversionError, match="that filter_fn accepts"):
        low_rank_(qkv(), filter_fn=lambda layer, name: False)
    with pytest.raises(ConversionError, match="nothing to merge"):
        merge_low_rank_(qkv())
    with pytest.raises(ValueError, match="start must be one of svd, fresh"):
        low_rank_(qkv(), start="random")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"whole number or None, got 2\.5"):
        low_rank_(qkv(), 2.5)  # type: ignore[arg-type]
    low_rank_(qkv(), np.int64(3))
    for function in (low_rank_, merge_low_rank_):
        with pytest.raises(TypeError, match=r"nn.Module"):
            function(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", CHANGING)
def test_together_with_every_other(other: str) -> None:
    """Both apply; it trains; what folds, folds with the same outputs, and the factors are one layer again."""
    example = small("vit-post" if other == "deepnorm" else "vit")
    stabilize_(example.model, f"{other}+low-rank:rank=5")
    losses = step_(example, lr=3e-3, steps=4)
    assert losses[-1] < losses[0]
    expected = example.logits(example.model).detach()
    fold_(example.model)
    torch.testing.assert_close(example.logits(example.model), expected, **CLOSE)
    assert not any(isinstance(module, LowRankLinear) for module in example.model.modules())


# sigma, spectral-norm and weight-norm see two weights where there was one; init-scale changes values by them.
OF_THE_FUNCTION = ["qk-norm", "deepnorm", "layer-scale", "rezero", "softcap:attention=0.1:logits=2", "z-loss"]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *(("vit-post", each) for each in OF_THE_FUNCTION),
        *((name, each) for name in ("gpt2", "llama") for each in ("qk-norm", "layer-scale")),
        ("bert", "deepnorm"),
        ("bert", "qk-norm"),
    ],
)
def test_others_find_queries_keys_and_values_in_the_factors(name: str, other: str) -> None:
    """With factors of full rank the model is the same function, and another stabilizer makes the same of it."""
    alone, both = small(name), small(name)
    stabilize_(alone.model, other)
    # llama's keys and values have but 12 features
    low_rank_(both.model, 24, filter_fn=lambda layer, own: "q_proj" in own or name != "llama")
    if name == "llama":
        low_rank_(both.model, 12, filter_fn=lambda layer, own: "q_proj" not in own)
    stabilize_(both.model, other)
    torch.testing.assert_close(both.logits(both.model), alone.logits(alone.model), **CLOSE)


@pytest.mark.parametrize(
    ("name", "other"), [("vit", ""), ("gpt2", ""), ("vit", "sigma:blocks=heads+"), ("gpt2", "sigma+")]
)
def test_qk_clip_scales_the_last_factors(name: str, other: str) -> None:
    """A step that changes nothing, then the clip: logits are those of the plain model clipped."""
    found = []
    for spec in (f"{other}qk-clip:tau=0.01", f"low-rank:rank=24+{other}qk-clip:tau=0.01"):
        example = small(name)
        stabilize_(example.model, spec)
        optimizer = torch.optim.SGD(example.model.parameters(), lr=0.0)
        example.loss(example.model).backward()
        optimizer.step()
        found.append(example.logits(example.model).detach())
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    plain = small(name)
    assert not torch.allclose(found[0], plain.logits(plain.model), atol=1e-4)


def test_sigma_sees_both_factors_and_their_heads() -> None:
    for blocks, of_up in (("auto", 1), ("heads", 4)):
        for name, layer in (("vit", "blocks.0.attention.query"), ("gpt2", "transformer.h.0.attn.c_attn.query")):
            model = small(name).model
            stabilize_(model, f"low-rank+sigma:layers=attention:blocks={blocks}")
            gammas = {key: len(gamma) for key, (_, gamma) in sigma_gamma(model).items()}
            assert gammas[f"{layer}.up.weight"] == of_up
            assert gammas[f"{layer}.down.weight"] == 1


@pytest.mark.parametrize(
    ("name", "spec"),
    [("gpt2", "low-rank:rank=7"), ("vit", "low-rank:rank=7+sigma:gamma_init=one"), ("llama", "low-rank:rank=7+sigma")],
)
def test_watch_sees_every_head_and_the_energy_of_the_product(name: str, spec: str, tmp_path: Any) -> None:
    example = small(name)
    stabilize_(example.model, spec)
    optimizer = torch.optim.SGD(example.model.parameters(), lr=1e-3)
    with Watch(example.model, tmp_path / "run", every=1) as watch:
        loss = example.loss(example.model)
        loss.backward()
        optimizer.step()
        watch.step(loss)
        coverage = watch.coverage()
        line = watch.last
    merged = copy.deepcopy(example.model)
    fold_(merged)
    expected = qk_energies(merged)
    assert not coverage.unseen
    assert [row.heads for row in coverage] == [4] * len(expected)
    found = qk_energies(example.model)
    assert found.keys() == expected.keys()
    for holder, energies in expected.items():
        assert found[holder] == pytest.approx(energies, rel=1e-9)
        assert line["qk_energy"][holder] == pytest.approx(energies, rel=1e-9)
    assert sum(".up.weight" in key for key in line["sigma"]) >= 3


def test_norms_of_heads_move_to_the_merged_layer() -> None:
    example, plain = small("vit"), small("vit")
    stabilize_(example.model, "low-rank+qk-norm")
    stabilize_(plain.model, "qk-norm")
    expected = example.logits(example.model).detach()
    fold_(example.model)
    assert list(example.model.state_dict()) == list(plain.model.state_dict())
    plain.model.load_state_dict(example.model.state_dict())
    torch.testing.assert_close(plain.logits(plain.model), expected, **CLOSE)
    fused = small("gpt2")
    stabilize_(fused.model, "low-rank+qk-norm")
    before = fused.model.state_dict()
    with pytest.raises(ConversionError, match=r"c_attn.query.up has hooks or layers of its own"):
        fold_(fused.model)
    assert fused.model.state_dict().keys() == before.keys()


def test_what_is_not_plain_is_not_merged() -> None:
    for spec in ("sigma", "weight-norm"):
        example = small("vit")
        stabilize_(example.model, f"low-rank+{spec}")
        with pytest.raises(ConversionError, match=r"tt.fold_ does both"):
            merge_low_rank_(example.model)
    holder = qkv()
    low_rank_(holder)
    with torch.no_grad():
        holder.get_parameter("value.down.weight")[0, 0] = torch.nan
    with pytest.raises(ConversionError, match=r"value.down is not finite"):
        merge_low_rank_(holder)
    assert isinstance(holder.query, LowRankLinear)


class OwnBlock(nn.Module):
    """A block that makes its queries itself, one after the other or fused."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads = 2
        names = ("qkv",) if fused else ("q_proj", "k_proj", "v_proj")
        for name in names:
            self.add_module(name, nn.Linear(8, 24 // len(names)))
        self.out_proj, self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)


@pytest.mark.parametrize("fused", [False, True])
def test_factors_are_no_residual_branches(fused: bool) -> None:
    plain = nn.Sequential(OwnBlock(fused), OwnBlock(fused))
    low = copy.deepcopy(plain)
    low_rank_(low)
    assert [each.name for each in residual_branches(low)] == [each.name for each in residual_branches(plain)]
    stabilize_(low, "sigma:layers=attention")
    layers = {name.split(".")[1] for name in sigma_gamma(low)}
    assert layers == ({"qkv", "out_proj"} if fused else {"q_proj", "k_proj", "v_proj", "out_proj"})


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_layer_equals_plain_attention_with_the_products(is_causal: bool) -> None:
    torch.manual_seed(0)
    layer = LowRankAttention(12, 3, 5, is_causal=is_causal).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    query, key, value = (
        F.linear(x, each.up.weight @ each.down.weight, each.up.bias).unflatten(-1, (3, 4)).transpose(1, 2)
        for each in (layer.query, layer.key, layer.value)
    )
    logits = query @ key.mT / 2
    if is_causal:
        logits = logits.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    expected = layer.out((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)
    merged = copy.deepcopy(layer)
    merge_low_rank_(merged)
    torch.testing.assert_close(merged(x), expected)
    assert type(merged.query) is nn.Linear
    sizes = {"image_size": 2, "patch_size": 1, "in_channels": 1, "num_classes": 2, "depth": 1}
    plain = Attention(ViTConfig(dim=12, num_heads=3, **sizes)).double()
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in LowRankAttention(12, 3).parameters())
    if not is_causal:
        plain.load_state_dict(merged.state_dict())
        torch.testing.assert_close(plain(x), expected)


def test_layers_built_of_low_rank_are_not_folded() -> None:
    """They are the model's design: only `merge_low_rank_` multiplies them."""
    model = nn.Sequential(LowRankAttention(8, 2))
    keys = list(model.state_dict())
    stabilize_(model, "sigma")
    fold_(model)
    assert list(model.state_dict()) == keys


def test_the_fused_layer_puts_its_parts_beside_each_other() -> None:
    torch.manual_seed(0)
    parts = {name: LowRankLinear(6, width, 2) for name, width in (("query", 6), ("key", 4), ("value", 4))}
    x = torch.randn(3, 6)
    expected: list[Tensor] = [part(x) for part in parts.values()]
    assert torch.equal(LowRankFused(parts)(x), torch.cat(expected, -1))
