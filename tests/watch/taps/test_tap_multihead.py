"""nn.MultiheadAttention and the torch Transformer in every mode, against the weights that torch itself returns."""

import pytest
import torch
from torch import Tensor, nn

from trimtab.reparam import reparametrize_
from trimtab.watch.observe import observe
from trimtab.watch.taps import AttentionTap


class Holder(nn.Module):
    """Calls its attention with whatever it is given."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)[0]


def entropies(module: nn.Module, *inputs: Tensor, **masks: Tensor) -> Tensor:
    """Mean entropy per head of the weights that the module returns in evaluation."""
    with torch.no_grad():
        _, weights = module.eval()(*inputs, need_weights=True, average_attn_weights=False, **masks)
    entropy = torch.special.entr(weights.double()).sum(-1)
    return entropy.mean(-1) if entropy.ndim == 2 else entropy.mean((0, 2))


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "other key and value widths": {"kdim": 12, "vdim": 10},
    "bias_k": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "both more keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_cross_attention_with_masks(options, converted, need_weights) -> None:
    torch.manual_seed(0)
    training, batch_first = converted != need_weights, need_weights
    own = OPTIONS[options]
    attention = nn.MultiheadAttention(16, 4, dropout=0.3, batch_first=batch_first, **own)
    nn.init.normal_(attention.in_proj_weight if attention.in_proj_weight is not None else attention.q_proj_weight)
    if converted:
        reparametrize_(attention)
    key, value = torch.randn(3, 7, own.get("kdim", 16)), torch.randn(3, 7, own.get("vdim", 16))
    inputs = [torch.randn(3, 5, 16), key, value]
    if not batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    padding = torch.zeros(3, 7)
    padding[1, 4:] = -torch.inf
    mask = torch.randn(5, 7)
    mask[0, 2] = -torch.inf
    masks = {"key_padding_mask": padding, "attn_mask": mask}
    expected = entropies(attention, *inputs, **masks)
    model = Holder(attention).train(training)
    with observe(model) as seen:
        model(*inputs, need_weights=need_weights, **masks)
    assert list(seen.heads) == ["attention"]
    assert seen.heads["attention"].entropy == pytest.approx(expected.tolist(), abs=1e-5)
    assert {row.seen for row in seen.coverage} == {"exact"}


@pytest.mark.parametrize("shape", ["(H B, L, S)", "(L, S)"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_boolean_masks_hide_where_true(shape, need_weights) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    mask = torch.rand((12, 5, 5) if shape.startswith("(H") else (5, 5)) > 0.6
    mask[..., 0] = False
    x = torch.randn(3, 5, 16) * 3
    expected = entropies(attention, x, x, x, attn_mask=mask)
    model = Holder(attention).train()
    with observe(model) as seen:
        model(x, x, x, attn_mask=mask, need_weights=need_weights)
    assert seen.heads["attention"].entropy == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
def test_without_a_batch(need_weights) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4)
    x = torch.randn(5, 16) * 3
    padding = torch.tensor([False, False, False, True, True])
    expected = entropies(attention, x, x, x, key_padding_mask=padding)
    model = Holder(attention).train()
    with observe(model) as seen:
        model(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert seen.heads["attention"].entropy == pytest.approx(expected.tolist(), abs=1e-5)


def test_with_need_weights_false_nothing_is_computed_twice(monkeypatch) -> None:
    """The queries and keys are those that scaled_dot_product_attention gets."""
    monkeypatch.setattr("trimtab.watch.taps.multihead._project", lambda *_: 1 / 0)
    model = Holder(nn.MultiheadAttention(16, 4))
    x = torch.randn(5, 3, 16)
    with observe(model) as seen:
        model(x, x, x, need_weights=False)
    assert [row.seen for row in seen.coverage] == ["exact"]


def test_causal_hint_with_its_mask() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    x, mask = torch.randn(3, 5, 16) * 3, nn.Transformer.generate_square_subsequent_mask(5)
    expected = entropies(attention, x, x, x, attn_mask=mask)
    for need_weights in (True, False):
        model = Holder(attention).train()
        with observe(model) as seen:
            model(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
        assert seen.heads["attention"].entropy == pytest.approx(expected.tolist(), abs=1e-5)


def per_layer(model: nn.TransformerEncoder, x: Tensor, norm_first: bool, **masks: Tensor) -> list[Tensor]:
    """Entropies of each layer, by hand through torch's slow path."""
    found = []
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            for layer in model.layers:
                inner = layer.norm1(x) if norm_first else x
                _, weights = layer.self_attn(
                    inner, inner, inner, need_weights=True, average_attn_weights=False, **masks
                )
                found.append(weights.double())
                x = layer(x, src_key_padding_mask=masks.get("key_padding_mask"))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return [torch.special.entr(weights).sum(-1) for weights in found]  # (B, H, L)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_the_fast_path_is_taken_as_ever_and_seen(norm_first, nested, monkeypatch) -> None:
    if nested and norm_first:
        pytest.skip("torch packs sequences only without norm_first")
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x = torch.randn(3, 6, 16) * 2
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 3:] = True
    expected = per_layer(model, x, norm_first, key_padding_mask=padding)
    taken, fused = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: taken.append(1) or fused(*args))
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=padding)
        assert len(taken) == 2
        with observe(model) as seen:
            watched = model(x, src_key_padding_mask=padding)
    assert len(taken) == 4
    assert torch.equal(plain, watched)
    assert list(seen.heads) == ["layers.0.self_attn", "layers.1.self_attn"]
    for name, entropy in zip(seen.heads, expected, strict=True):
        # Packed sequences have no padding, so their queries are not there to be counted.
        counted = entropy.movedim(1, 0)[:, ~padding] if nested else entropy.movedim(1, 0).flatten(1)
        assert seen.heads[name].entropy == pytest.approx(counted.mean(1).tolist(), abs=1e-5)
    assert [row.back_end for row in seen.coverage] == ["nn.TransformerEncoderLayer, fast path"] * 2


def test_a_fast_attention_module_by_itself(monkeypatch) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(3, 5, 16) * 3
    expected = entropies(attention, x, x, x)
    model = Holder(attention).eval()
    taken, fused = [], torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: taken.append(1) or fused(*args))
    with torch.no_grad(), observe(model) as seen:
        model(x, x, x)
    assert taken == [1]
    assert seen.heads["attention"].entropy == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_transformer(training) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True).train(training)
    with observe(model) as seen:
        model(torch.randn(2, 6, 16), torch.randn(2, 4, 16))
    assert list(seen.heads) == [
        *(f"encoder.layers.{n}.self_attn" for n in range(2)),
        *(f"decoder.layers.{n}.{kind}" for n in range(2) for kind in ("self_attn", "multihead_attn")),
    ]
    assert {row.seen for row in seen.coverage} == {"exact"}


def test_a_subclass_with_attention_of_its_own_is_not_taken_for_torchs() -> None:
    class Sharper(nn.MultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor):
            return query, None

    model = Holder(Sharper(16, 4))
    x = torch.randn(5, 3, 16)
    with observe(model) as seen:
        model(x, x, x)
    assert seen.heads == {}
    assert seen.coverage.unseen.keys() == {"attention"}


@pytest.mark.parametrize("need_weights", [True, False])
def test_under_autocast_gradients_are_what_they_were(need_weights) -> None:
    """Autocast keeps the weights it casts, also those cast while watching."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    model, x = Holder(attention), torch.randn(3, 5, 16)

    def gradient(watched: bool) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if watched:
                with observe(model) as seen:
                    first = model(x, x, x, need_weights=need_weights)
                assert [row.seen for row in seen.coverage] == ["exact"]
            else:
                first = model(x, x, x, need_weights=need_weights)
            second = model(2 * x, x, x, need_weights=need_weights)
        (first.sum() + second.square().sum()).backward()
        return attention.in_proj_weight.grad.clone()

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("need_weights", [True, False])
def test_training_is_bit_identical(need_weights) -> None:
    """Dropout draws the same numbers, and no gradient differs in its last bit."""
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Holder(reparametrize_(nn.MultiheadAttention(16, 4, dropout=0.3)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tap = AttentionTap(model, lambda watched=watched: watched)
        for _ in range(3):
            x = torch.randn(5, 3, 16)
            model(x, x, x, need_weights=need_weights).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert bool(tap.take()) == watched
        tap.close()
        ends.append([*model.state_dict().values(), torch.rand(2)])
    assert all(map(torch.equal, *ends))
