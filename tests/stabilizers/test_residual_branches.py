"""Which layers end a residual branch, and what layer-scale, rezero and deepnorm make of them: the written equations."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stabilizer_case import small, step_
from torch import Tensor, nn

from trimtab.errors import ConversionError
from trimtab.stabilizers import fold_, stabilize_
from trimtab.stabilizers.deepnorm import alpha_beta
from trimtab.stabilizers.parts import attentions, blocks, layers_filter
from trimtab.stabilizers.residual import residual_branches

EXACT = {"rtol": 1e-10, "atol": 1e-11}  # float64, the same sums in another order


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", ["blocks.{}.attention.out", "blocks.{}.mlp.down"]),
        ("gpt2", ["transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"]),
        ("llama", ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"]),
        ("bert", ["bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"]),
        ("encoder", ["layers.{}.self_attn", "layers.{}.linear2"]),
    ],
)
def test_branches_of_known_models(name: str, expected: list[str]) -> None:
    model = small(name).model
    found = residual_branches(model)
    depth = len(blocks(model))
    assert [branch.name for branch in found] == [each.format(i) for i in range(depth) for each in expected]
    assert [branch.kind for branch in found] == ["attention", "mlp"] * depth


def hugging_face(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name + "Config")(**options)
    with torch.device("meta"):
        return getattr(transformers, name + "Model")(config)


@pytest.mark.parametrize(
    ("name", "options", "ends"),
    [
        ("ViT", {}, {"attention.o_proj", "mlp.fc2"}),
        ("T5", {}, {"SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"}),
        ("Bart", {}, {"self_attn.out_proj", "encoder_attn.out_proj", "fc2"}),
        ("DistilBert", {}, {"attention.out_lin", "ffn.lin2"}),
        ("GPTNeoX", {"hidden_size": 32, "num_attention_heads": 2}, {"attention.dense", "mlp.dense_4h_to_h"}),
        ("Wav2Vec2", {}, {"attention.out_proj", "feed_forward.output_dense"}),
        ("Qwen3", {}, {"self_attn.o_proj", "mlp.down_proj"}),
    ],
)
def test_branches_of_more_models(name: str, options: dict[str, Any], ends: set[str]) -> None:
    layers = {"num_layers": 1} if name == "T5" else {"num_hidden_layers": 1}
    layers |= {"encoder_layers": 1, "decoder_layers": 1} if name == "Bart" else {}
    found = residual_branches(hugging_face(name, **layers, **options))
    assert {".".join(branch.name.split(".")[-end.count(".") - 1 :]) for branch in found for end in ends} >= ends
    assert len(found) == {"T5": 5, "Bart": 5}.get(name, 2)


def test_branches_of_torchs_layers() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    assert [branch.name for branch in residual_branches(model)] == [
        "encoder.layers.0.self_attn",
        "encoder.layers.0.linear2",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
        "decoder.layers.0.linear2",
    ]
    assert list(blocks(nn.TransformerEncoderLayer(8, 2))) == [""]
    assert list(attentions(nn.MultiheadAttention(8, 2))) == [""]


class Flat(nn.Module):
    """A block without modules of its own for attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj, self.up, self.down = (nn.Linear(8, out) for out in (24, 8, 8, 8))


class Sequences(nn.Module):
    """A block whose MLP, and whose attention's end, are an nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        out = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
        self.attention = nn.ModuleDict({"to_qkv": nn.Linear(8, 24), "to_out": out})
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Dropout())


def test_blocks_in_other_styles() -> None:
    for block, ends, attention in (
        (Flat, ["proj", "down"], {"qkv", "proj"}),
        (Sequences, ["attention.to_out.0", "mlp.3"], {"attention.to_qkv", "attention.to_out.0"}),
    ):
        model = nn.ModuleDict({"embed": nn.Linear(8, 8), "blocks": nn.ModuleList([block(), block()])})
        names = [f"blocks.{i}.{end}" for i in range(2) for end in ends]
        assert [branch.name for branch in residual_branches(model)] == names
        is_meant = layers_filter(model, "attention")
        assert is_meant is not None
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        meant = {name for name in linear if is_meant(model, name)}
        assert meant == {f"blocks.{i}.{name}" for i in range(2) for name in attention}
        is_meant = layers_filter(model, "mlp")
        assert is_meant is not None
        assert {name for name in linear if is_meant(model, name)} == set(linear) - meant - {"embed"}


class Odd(nn.Module):
    """An attention whose last layer has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.finish = (nn.Linear(4, 4) for _ in range(4))


def test_what_cannot_be_found_is_told() -> None:
    with pytest.raises(ConversionError, match="found no residual branches"):
        stabilize_(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "rezero")
    block = nn.ModuleDict({"attention": Odd(), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
    with pytest.raises(ConversionError, match=r"0\.attention ends in no single layer .* looked for .* o_proj"):
        stabilize_(nn.ModuleList([block]), "layer-scale")
    block = nn.ModuleDict(
        {"attention": small("vit").model.get_submodule("blocks.0.attention"), "last": nn.Linear(8, 4)}
    )
    with pytest.raises(ConversionError, match=r"0 has no MLP .* down_proj"):
        stabilize_(nn.ModuleList([block]), "layer-scale")


def branches_of(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the two halves of a pre-LN block add, the second given what the first made of x."""
    return block.attention(block.attention_norm(x)), block.mlp(block.mlp_norm(x))


def test_layer_scale_is_the_papers_equation() -> None:
    plain, scaled = small("vit").model, small("vit").model
    stabilize_(scaled, "layer-scale:init=0.3")
    own: Any = scaled.get_submodule("blocks.1")
    plain_block: Any = plain.get_submodule("blocks.1")
    torch.manual_seed(0)
    factors = [torch.randn(24, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for layer, factor in zip((own.attention.out, own.mlp.down), factors, strict=True):
            torch.testing.assert_close(layer.residual_scale, torch.full_like(factor, 0.3), rtol=0, atol=0)
            layer.residual_scale.copy_(factor)
    x = torch.randn(2, 4, 24, dtype=torch.float64)
    middle = x + factors[0] * branches_of(plain_block, x)[0]
    expected = middle + factors[1] * branches_of(plain_block, middle)[1]
    torch.testing.assert_close(own(x), expected, **EXACT)


@pytest.mark.parametrize(("depth", "start"), [(18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)])
def test_layer_scale_starts_by_depth(depth: int, start: float) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), depth)
    stabilize_(model, "layer-scale")
    scales = [tensor for name, tensor in model.named_parameters() if name.endswith("residual_scale")]
    assert len(scales) == 2 * depth
    assert all(bool((scale == torch.tensor(start)).all()) for scale in scales)


def test_rezero_starts_as_the_identity_and_learns_one_factor_a_branch() -> None:
    example = small("vit")
    stabilize_(example.model, "rezero:remove_norms=true")
    block: Any = example.model.get_submodule("blocks.0")
    x = torch.randn(2, 4, 24, dtype=torch.float64)
    assert torch.equal(block(x), x)
    assert not any(isinstance(module, nn.LayerNorm) for module in example.model.modules())
    example.loss(example.model).backward()
    assert all(block.get_parameter(f"{n}.residual_scale").grad.abs() > 0 for n in ("attention.out", "mlp.down"))
    assert not block.mlp.up.weight.grad.any()


def test_deepnorm_is_the_papers_equation() -> None:
    plain, deep = small("vit-post").model, small("vit-post").model
    stabilize_(deep, "deepnorm")
    alpha, beta = 4**0.25, 16**-0.25  # two blocks
    assert alpha_beta(2, 0, cross=False) == pytest.approx((alpha, beta))
    x = torch.randn(2, 4, 24, dtype=torch.float64)
    for i in range(2):
        block: Any = plain.get_submodule(f"blocks.{i}")
        with torch.no_grad():
            for layer in (block.attention.value, block.attention.out, block.mlp.up, block.mlp.down):
                layer.weight *= beta
        middle = block.attention_norm(alpha * x + block.attention(x))
        expected = block.mlp_norm(alpha * middle + block.mlp(middle))
        torch.testing.assert_close(deep.get_submodule(f"blocks.{i}")(x), expected, **EXACT)
    names = dict(plain.named_parameters())
    for name, parameter in deep.named_parameters():
        torch.testing.assert_close(parameter, names[name], **EXACT)


def test_deepnorm_of_an_encoder_and_decoder() -> None:
    """Against the equations written out over torch's own attention."""
    torch.manual_seed(0)
    layers, width = (2, 3), 8
    plain: Any = nn.Transformer(width, 2, *layers, 16, dropout=0.0, batch_first=True).double()
    torch.manual_seed(0)
    deep: Any = nn.Transformer(width, 2, *layers, 16, dropout=0.0, batch_first=True).double()
    stabilize_(deep, "deepnorm")
    n, m = layers
    constants = {
        "encoder": (0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16)),
        "decoder": ((3 * m) ** (1 / 4), (12 * m) ** (-1 / 4)),
    }
    for stack, (_, beta) in constants.items():
        for layer in getattr(plain, stack).layers:
            with torch.no_grad():
                for attention in (layer.self_attn, getattr(layer, "multihead_attn", None)):
                    if attention is not None:
                        attention.in_proj_weight[2 * width :] *= beta
                        attention.out_proj.weight *= beta
                layer.linear1.weight *= beta
                layer.linear2.weight *= beta

    def feed(layer: Any, x: Tensor) -> Tensor:
        return layer.linear2(F.relu(layer.linear1(x)))

    source, target = (torch.randn(2, 5, width, dtype=torch.float64) for _ in range(2))
    x, alpha = source, constants["encoder"][0]
    for layer in plain.encoder.layers:
        x = layer.norm1(alpha * x + layer.self_attn(x, x, x)[0])
        x = layer.norm2(alpha * x + feed(layer, x))
    memory = plain.encoder.norm(x)
    y, alpha = target, constants["decoder"][0]
    for layer in plain.decoder.layers:
        y = layer.norm1(alpha * y + layer.self_attn(y, y, y)[0])
        y = layer.norm2(alpha * y + layer.multihead_attn(y, memory, memory)[0])
        y = layer.norm3(alpha * y + feed(layer, y))
    torch.testing.assert_close(deep(source, target), plain.decoder.norm(y), **EXACT)


def test_deepnorm_scales_the_weight_in_use_whatever_else_is_applied() -> None:
    alpha_, beta = alpha_beta(2, 0, cross=False)
    for spec in ("sigma:gamma_init=one:layers=blocks", "weight-norm:layers=blocks"):
        alone, both = small("encoder").model, small("encoder").model
        stabilize_(alone, spec)
        stabilize_(both, spec + "+deepnorm")
        fold_(alone)
        fold_(both)
        for (name, a), (_, b) in zip(alone.named_parameters(), both.named_parameters(), strict=True):
            factor = torch.ones_like(a)
            if name.endswith("in_proj_weight"):
                factor[48:] = beta
            elif name.endswith(("linear1.weight",)):
                factor *= beta
            elif name.endswith(("out_proj.weight", "linear2.weight")):
                factor *= beta / alpha_
            elif name.endswith(("out_proj.bias", "linear2.bias")):
                factor /= alpha_
            torch.testing.assert_close(b, a * factor, **EXACT)


def test_deepnorm_needs_to_know_the_values() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConversionError, match=r"self_attn.in_proj_weight has one sigma for values and other things"):
        stabilize_(model, "sigma:blocks=one+deepnorm")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_folding_is_refused_where_it_would_change_something_else() -> None:
    model = small("vit").model
    stabilize_(model, "layer-scale")
    model.get_submodule("blocks.0.mlp").down.weight = model.get_submodule("blocks.1.mlp").down.weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConversionError, match="shares its weight"):
        fold_(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    broken = small("vit").model
    stabilize_(broken, "layer-scale")
    with torch.no_grad():
        broken.get_submodule("blocks.0.mlp").down.residual_scale[0] = math.nan
    with pytest.raises(ConversionError, match="not finite"):
        fold_(broken)


def test_a_scale_of_a_half_precision_model_under_autocast() -> None:
    model = small("vit").model.float()
    stabilize_(model, "layer-scale")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.get_submodule("blocks.0.mlp")(torch.randn(2, 4, 24)).dtype == torch.bfloat16


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    for spec in ("layer-scale", "rezero", "deepnorm"):
        with pytest.raises(ConversionError, match=r"self_attn is on the meta device: give it values first"):
            stabilize_(model, spec)


@pytest.mark.parametrize("spec", ["layer-scale:init=0.5", "deepnorm"])
def test_an_encoder_with_padding_is_evaluated_without_nested_tensors(spec: str) -> None:
    example = small("encoder")
    encoder: Any = stabilize_(example.model, spec)
    tokens = torch.randn(2, 5, 24, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = encoder(tokens, src_key_padding_mask=padding)
    with torch.no_grad():
        found = encoder.eval()(tokens, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], **EXACT)
    fold_(encoder)
    assert encoder.use_nested_tensor
    assert all(layer.activation_relu_or_gelu for layer in encoder.layers)


def test_a_fold_that_fails_halfway_is_undone() -> None:
    example = small("vit")
    stabilize_(example.model, "sigma+layer-scale")
    with torch.no_grad():
        example.model.get_submodule("blocks.0.mlp").down.residual_scale[0] = math.inf
    before = {name: tensor.clone() for name, tensor in example.model.state_dict().items()}
    classes = [type(module) for module in example.model.modules()]
    with pytest.raises(ConversionError, match="not finite"):
        fold_(example.model)
    torch.testing.assert_close(example.model.state_dict(), before, rtol=0, atol=0)
    assert [type(module) for module in example.model.modules()] == classes
    with torch.no_grad():
        example.model.get_submodule("blocks.0.mlp").down.residual_scale[0] = 1
    step_(example)
    vectors = [name for name in before if name.endswith("sigma_u")]
    assert not any(torch.equal(example.model.state_dict()[name], before[name]) for name in vectors)  # followed again
    expected = example.logits(example.model)
    fold_(example.model)
    torch.testing.assert_close(example.logits(example.model), expected, **EXACT)
