"""nn.MultiheadAttention and the layers of nn.Transformer, converted, against torch's own."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt

E, H, B, L, S = 12, 3, 2, 5, 7


def make(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, H, **options).double()
    for parameter in attention.parameters():  # biases start at zero: they would hide a mistake
        nn.init.normal_(parameter, std=0.5)
    return attention


def scaled_by_gamma(attention: nn.MultiheadAttention, factor: float = 0.6) -> tuple[nn.MultiheadAttention, Any]:
    """Return (converted with gammas changed, torch's own attention with the effective weights written in)."""
    plain = make(**OPTIONS_OF[id(attention)])
    tt.reparametrize_(attention)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.endswith("gamma"):
                parameter.mul_(torch.linspace(factor, 1.4, parameter.numel(), dtype=parameter.dtype))
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(plain, name) is not None:
                getattr(plain, name).copy_(tt.effective_weight(attention, name))
        plain.out_proj.weight.copy_(tt.effective_weight(attention.out_proj))
    return attention, plain


OPTIONS_OF: dict[int, dict[str, Any]] = {}


def pair(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    attention = make(**options)
    OPTIONS_OF[id(attention)] = options
    return scaled_by_gamma(attention)


def inputs(options: dict[str, Any], how: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    kdim, vdim = options.get("kdim", E), options.get("vdim", E)

    def draw(length: int, width: int) -> Tensor:
        x = torch.randn(B, length, width, generator=generator, dtype=torch.float64)
        return x if options.get("batch_first") else x.transpose(0, 1)

    query = draw(L, E)
    if how == "self":
        return query, query, query
    return query, draw(S, kdim), draw(S, vdim)


LAYERS = {
    "packed": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False, "batch_first": True},
    "separate": {"kdim": 8, "vdim": 6, "batch_first": True},
    "separate-no-bias": {"kdim": 8, "vdim": 6, "bias": False},
    "bias-kv": {"add_bias_kv": True, "batch_first": True},
    "zero-attn": {"add_zero_attn": True},
    "both-extras": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("masks", ["none", "bool", "float", "per-head", "padding", "bool+padding", "float+padding"])
def test_equals_torch_with_the_effective_weights(options: dict[str, Any], masks: str) -> None:
    ours, plain = pair(**options)
    for how, need_weights, average in itertools.product(("self", "cross"), (True, False), (True, False)):
        if how == "self" and "kdim" in options:
            continue
        query, key, value = inputs(options, how)
        keys = L if how == "self" else S
        generator = torch.Generator().manual_seed(2)
        arguments: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average}
        boolean = torch.rand(L, keys, generator=generator) < 0.3
        boolean[:, 0] = False
        if "bool" in masks:
            arguments["attn_mask"] = boolean
        if "float" in masks:
            arguments["attn_mask"] = torch.randn(L, keys, generator=generator, dtype=torch.float64)
        if masks == "per-head":
            arguments["attn_mask"] = torch.randn(B * H, L, keys, generator=generator, dtype=torch.float64)
        if "padding" in masks:
            arguments["key_padding_mask"] = torch.arange(keys) >= torch.tensor([[keys], [keys - 2]])
            if "float" in masks:  # torch asks for the same kind of mask twice
                zeros = torch.zeros(B, keys, dtype=torch.float64)
                arguments["key_padding_mask"] = zeros.masked_fill(arguments["key_padding_mask"], -torch.inf)
        torch.testing.assert_close(ours(query, key, value, **arguments), plain(query, key, value, **arguments))


@pytest.mark.parametrize("options", [{}, {"batch_first": True}], ids=["seq-first", "batch-first"])
def test_unbatched_input(options: dict[str, Any]) -> None:
    ours, plain = pair(**options)
    query, key = (torch.randn(n, E, dtype=torch.float64) for n in (L, S))
    mask = torch.arange(S) > 4
    for average in (True, False):
        arguments = {"key_padding_mask": mask, "average_attn_weights": average}
        torch.testing.assert_close(ours(query, key, key, **arguments), plain(query, key, key, **arguments))
    arguments = {"need_weights": False}
    torch.testing.assert_close(ours(query, query, query, **arguments), plain(query, query, query, **arguments))


def test_the_causal_hint() -> None:
    ours, plain = pair(batch_first=True)
    query = inputs({"batch_first": True}, "self")[0]
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    padding = torch.arange(L) >= torch.tensor([[L], [L - 1]])
    float_padding = torch.zeros(B, L, dtype=torch.float64).masked_fill(padding, -torch.inf)
    for need_weights, key_padding in itertools.product((True, False), (None, float_padding)):
        arguments = {
            "attn_mask": mask,
            "is_causal": True,
            "need_weights": need_weights,
            "key_padding_mask": key_padding,
        }
        torch.testing.assert_close(ours(query, query, query, **arguments), plain(query, query, query, **arguments))
    with pytest.raises(ValueError, match="pass the mask as well"):
        ours(query, query, query, is_causal=True)


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_gradients_equal_explicit_autograd(options: dict[str, Any]) -> None:
    """Against torch's attention fed with gamma * W / (v^T W u) as an ordinary differentiable expression."""
    ours, plain = pair(**options)
    for how in ("self", "cross") if "kdim" not in options else ("cross",):
        query, key, value = inputs(options, how)
        ours.zero_grad()
        ours(query, key, value, need_weights=False)[0].square().sum().backward()
        effective = {}
        leaves: dict[str, Tensor] = {}
        for name in ours._carried_sizes:
            c = ours.carried(name)
            weight, gamma = c.weight.detach().requires_grad_(), c.gamma.detach().requires_grad_()
            leaves[name], leaves[name.replace("weight", "gamma")] = weight, gamma
            blocks = zip(weight.split(c.sizes), gamma, c.u, c.v.split(c.sizes), strict=True)
            effective[name] = torch.cat([g * w / (v @ w @ u) for w, g, u, v in blocks])
        output = torch.func.functional_call(plain, effective, (query, key, value), {"need_weights": False})[0]
        grads = torch.autograd.grad(output.square().sum(), list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            torch.testing.assert_close(getattr(ours, name).grad, grad)


BLOCKS: dict[str, Any] = {
    "one": "one",
    "heads": "heads",
    "query-and-the-rest": lambda module, name: None if name else (E, 2 * E),
    "across": lambda module, name: None if name else (5, 20, 11),
    "unequal-within": lambda module, name: None if name else (5, 7, E, 1, 11),
}


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_other_blocks_compute_the_same_and_their_gradients_are_autograds(blocks: Any, bias: bool) -> None:
    """Against torch's attention fed with gamma * W / (v^T W u) of every block, an ordinary expression."""
    options = {"batch_first": True, "bias": bias}
    plain, ours = make(**options), tt.reparametrize_(make(**options), tt.SigmaReparam(blocks=blocks))
    query, key, value = inputs(options, "cross")
    arguments = {"self": (query, query, query), "keys-are-values": (query, key, key), "cross": (query, key, value)}
    for given in arguments.values():
        torch.testing.assert_close(ours(*given), plain(*given))
    c = ours.carried("in_proj_weight")
    with torch.no_grad():
        c.gamma.mul_(torch.linspace(0.5, 1.5, len(c.sizes), dtype=torch.float64))
    for given in arguments.values():
        ours.zero_grad()
        tracked = [x.clone().requires_grad_() for x in given] if given[0] is not given[1] else [given[0]] * 3
        ours(*tracked, need_weights=False)[0].square().sum().backward()
        weight, gamma = c.weight.detach().requires_grad_(), c.gamma.detach().requires_grad_()
        parts = zip(weight.split(c.sizes), gamma, c.u, c.v.split(c.sizes), strict=True)
        effective = {"in_proj_weight": torch.cat([g * w / (v @ w @ u) for w, g, u, v in parts])}
        again = [x.detach().requires_grad_() for x in tracked] if given[0] is not given[1] else tracked
        output = torch.func.functional_call(plain, effective, tuple(again), {"need_weights": False})[0]
        leaves = [weight, gamma, *(again if again[0].requires_grad else ())]
        found = [ours.in_proj_weight.grad, ours.in_proj_gamma.grad, *(x.grad for x in tracked if x.requires_grad)]
        for ours_grad, grad in zip(found, torch.autograd.grad(output.square().sum(), leaves), strict=True):
            torch.testing.assert_close(ours_grad, grad)


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS.keys())
def test_other_blocks_compile_and_autocast(blocks: Any) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    query, key = torch.randn(B, L, E), torch.randn(B, S, E)
    with torch.autocast("cpu", torch.bfloat16):
        expected = attention(query, key, key, need_weights=False)[0]
    tt.reparametrize_(attention, tt.SigmaReparam(blocks=blocks))
    with torch.autocast("cpu", torch.bfloat16):
        output = attention(query, key, key, need_weights=False)[0]
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.01)  # a few steps of bfloat16's 2^-8
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, key)[0], attention(query, key, key)[0])


def test_every_projection_has_its_own_sigma() -> None:
    attention = tt.reparametrize_(make())
    with torch.no_grad():
        attention.in_proj_gamma.copy_(torch.tensor([0.5, 2.0, 3.0]))
        attention.out_proj.gamma.fill_(4.0)
    parts = tt.effective_weight(attention).chunk(3)
    norms = [torch.linalg.matrix_norm(part, 2) for part in (*parts, tt.effective_weight(attention.out_proj))]
    torch.testing.assert_close(torch.stack(norms), torch.tensor([0.5, 2.0, 3.0, 4.0], dtype=torch.float64))


def test_only_the_output_projection_converted() -> None:
    plain, ours = make(batch_first=True), make(batch_first=True)
    tt.reparametrize_(ours, filter_fn=lambda module, name: name == "out_proj")
    assert "in_proj_gamma" not in dict(ours.named_parameters())
    query, key, _ = inputs({"batch_first": True}, "cross")
    torch.testing.assert_close(ours(query, key, key), plain(query, key, key))
    with torch.no_grad():
        ours.out_proj.gamma.zero_()
    assert torch.equal(ours(query, key, key)[0], ours.out_proj.bias.expand(B, L, E))
    tt.fold_(ours)
    assert type(ours) is nn.MultiheadAttention


@pytest.mark.parametrize("first", ["", "out_proj"], ids=["inputs-first", "output-first"])
def test_converted_in_two_passes(first: str) -> None:
    once, twice = make(batch_first=True), make(batch_first=True)
    tt.reparametrize_(once)
    tt.reparametrize_(twice, filter_fn=lambda module, name: name == first)
    tt.reparametrize_(twice, filter_fn=lambda module, name: name != first)
    assert list(dict(twice.named_buffers())) == list(dict(once.named_buffers()))
    halve_gammas_(once)
    halve_gammas_(twice)
    query, key, _ = inputs({"batch_first": True}, "cross")
    torch.testing.assert_close(twice(query, key, key), once(query, key, key), rtol=0, atol=0)
    tt.fold_(twice)
    assert type(twice) is nn.MultiheadAttention
    assert not twice._forward_pre_hooks


def test_only_the_input_projections_converted() -> None:
    plain, ours = make(), make()
    tt.reparametrize_(ours, filter_fn=lambda module, name: name == "")
    assert not hasattr(ours.out_proj, "gamma")
    query, key, _ = inputs({}, "cross")
    torch.testing.assert_close(ours(query, key, key), plain(query, key, key))


def test_dropout_acts_in_training_only() -> None:
    ours, _ = pair(dropout=0.5, batch_first=True)
    query = inputs({"batch_first": True}, "self")[0]
    for need_weights in (True, False):
        assert not torch.equal(ours(query, query, query, need_weights=need_weights)[0], ours(query, query, query)[0])
        ours.eval()
        assert torch.allclose(ours(query, query, query, need_weights=need_weights)[0], ours(query, query, query)[0])
        ours.train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask": torch.zeros(3, 3)}, r"attn_mask: expected shape \(5, 5\)"),
        ({"key_padding_mask": torch.zeros(3, 3)}, r"key_padding_mask: expected shape \(2, 5\)"),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, "boolean or floating mask"),
    ],
)
def test_wrong_masks_are_refused(arguments: dict[str, Tensor], message: str) -> None:
    ours, _ = pair(batch_first=True)
    query = inputs({"batch_first": True}, "self")[0]
    with pytest.raises(ValueError, match=message):
        ours(query, query, query, **arguments)


def test_mixed_dimensions_are_refused() -> None:
    ours, _ = pair()
    query = inputs({}, "self")[0]
    with pytest.raises(ValueError, match="all of 3 dimensions"):
        ours(query, query[0], query)


# --- nn.TransformerEncoder ----------------------------------------------------------------------------------------


def encoder(**options: Any) -> tuple[nn.TransformerEncoder, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **options)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first", False))
    x = torch.randn(3, 6, 16)
    padding = torch.arange(6) >= torch.tensor([[6], [4], [2]])
    return model, x, padding


def halve_gammas_(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.mul_(0.5)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-LN", "pre-LN"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_agrees_in_training_and_evaluation(norm_first: bool, activation: str, padded: bool) -> None:
    model, x, padding = encoder(norm_first=norm_first, activation=activation)
    mask = padding if padded else None
    kept = ~padding if padded else torch.ones_like(padding)
    before = model(x, src_key_padding_mask=mask)
    tt.reparametrize_(model)
    torch.testing.assert_close(model(x, src_key_padding_mask=mask), before)
    halve_gammas_(model)  # a path that reads weights past the layers would not notice
    training = model(x, src_key_padding_mask=mask)
    assert (training - before).abs().max() > 1e-2
    model.eval()
    with torch.no_grad():
        evaluation = model(x, src_key_padding_mask=mask)
        with torch.inference_mode():
            inference = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(evaluation[kept], training[kept])
    torch.testing.assert_close(inference[kept], training[kept])
    for layer in model.layers:
        for part, gamma in zip(
            tt.effective_weight(layer.self_attn).chunk(3), layer.self_attn.in_proj_gamma, strict=True
        ):
            torch.testing.assert_close(torch.linalg.matrix_norm(part, 2), gamma)
        for linear in (layer.self_attn.out_proj, layer.linear1, layer.linear2):
            norm = torch.linalg.matrix_norm(tt.effective_weight(linear), 2)
            torch.testing.assert_close(norm, linear.gamma[0])


@pytest.mark.parametrize("part", ["self_attn", "linear1", "self_attn.out_proj"])
def test_one_converted_part_is_enough_to_leave_the_fast_path(part: str) -> None:
    model, x, padding = encoder()
    tt.reparametrize_(model, filter_fn=lambda module, name: name == f"layers.1.{part}")
    halve_gammas_(model)
    training = model(x, src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], training[~padding])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_folding_gives_the_fast_path_back() -> None:
    model, x, padding = encoder()
    switches = (model.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in model.layers))
    tt.reparametrize_(model)
    halve_gammas_(model)
    training = model(x, src_key_padding_mask=padding)
    tt.fold_(model)
    assert (model.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in model.layers)) == switches
    assert "_fast_path_before" not in model.__dict__
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], training[~padding])


def test_a_whole_transformer() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True).double()
    source, target = torch.randn(2, 5, 16).double(), torch.randn(2, 4, 16).double()
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    before = model(source, target, tgt_mask=causal, tgt_is_causal=True)
    tt.reparametrize_(model)
    torch.testing.assert_close(model(source, target, tgt_mask=causal, tgt_is_causal=True), before)
    halve_gammas_(model)
    training = model(source, target, tgt_mask=causal)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(source, target, tgt_mask=causal), training)


def test_encoder_layers_without_norms() -> None:
    model, x, padding = encoder()
    tt.remove_norms_(model)
    tt.reparametrize_(model)
    training = model(x, src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], training[~padding])
    tt.fold_(model)
    with torch.no_grad():  # the norms are gone for good, and with them the fast path
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], training[~padding])


@pytest.mark.parametrize("part", ["self_attn", "linear1", "linear2"])
def test_a_part_converted_by_itself_leaves_the_fast_path_too(part: str) -> None:
    model, x, _ = encoder()
    for layer in model.layers:
        tt.reparametrize_(layer.get_submodule(part))
    halve_gammas_(model)
    training = model(x)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), training)
    for layer in model.layers:
        tt.fold_(layer.get_submodule(part))
        assert not layer.get_submodule(part)._forward_pre_hooks
    with torch.no_grad():
        torch.testing.assert_close(model(x), training)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_attention_converted_by_itself_refuses_nested_input() -> None:
    model, x, padding = encoder()
    tt.reparametrize_(model.layers[0].self_attn)
    model.eval()
    with torch.no_grad(), pytest.raises(ValueError, match=r"convert the whole nn\.TransformerEncoder"):
        model(x, src_key_padding_mask=padding)


def test_an_output_projection_by_itself_is_refused() -> None:
    with pytest.raises(tt.ConversionError, match="output projection of an attention module"):
        tt.reparametrize_(make().out_proj)
