"""The encoder-decoder: the function of torch's own layers, padding that does not show, and what is kept in decoding."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt
from trimtab.errors import ConversionError, RecipeError
from trimtab.models.encoder_decoder import Cache, EncoderDecoder, EncoderDecoderConfig, sinusoids
from trimtab.reparam.layers import Reparametrized
from trimtab.stabilizers import STABILIZERS, with_changes
from trimtab.stabilizers.apply import changes_models

SMALL = EncoderDecoderConfig(
    source_vocab=13, target_vocab=13, dim=16, encoder_depth=2, decoder_depth=3, num_heads=4, dropout=0.0
)
# float64 in two orders of operations
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 0, 0], [2, 0, 0, 0, 0]])
TARGET = torch.tensor([[1, 4, 5, 6], [1, 7, 8, 0], [1, 0, 0, 0]])


def model(seed: int = 0, **changes: Any) -> EncoderDecoder:
    torch.manual_seed(seed)
    made = EncoderDecoder(replace(SMALL, **changes)).double()
    for module in made.modules():  # norms at their start are blind to some mistakes
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return made


def torchs(ours: EncoderDecoder) -> tuple[nn.Module, nn.Module]:
    """Torch's encoder and decoder, with the same weights."""
    config = ours.config
    options: dict[str, Any] = {
        "d_model": config.dim, "nhead": config.num_heads, "dim_feedforward": config.mlp_ratio * config.dim,
        "dropout": 0.0, "activation": config.activation, "batch_first": True, "norm_first": config.norm == "pre",
    }  # fmt: skip
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**options), config.encoder_depth,
        nn.LayerNorm(config.dim) if config.norm == "pre" else None, enable_nested_tensor=False,
    )  # fmt: skip
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(**options), config.decoder_depth,
        nn.LayerNorm(config.dim) if config.norm == "pre" else None,
    )  # fmt: skip
    for theirs, blocks, norm in (
        (encoder, ours.encoder, ours.encoder_norm),
        (decoder, ours.decoder, ours.decoder_norm),
    ):
        theirs.double()
        for layer, block in zip(theirs.layers, blocks, strict=True):
            named = {"self_attn": block.attention}
            norms = [block.attention_norm, block.mlp_norm]
            if blocks is ours.decoder:
                named["multihead_attn"] = block.cross_attention
                norms.insert(1, block.cross_attention_norm)
            for name, attention in named.items():
                their = getattr(layer, name)
                parts = (attention.query, attention.key, attention.value)
                their.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
                their.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
                their.out_proj.load_state_dict(attention.out.state_dict())
            layer.linear1.load_state_dict(block.mlp.up.state_dict())
            layer.linear2.load_state_dict(block.mlp.down.state_dict())
            for number, each in enumerate(norms, 1):
                getattr(layer, f"norm{number}").load_state_dict(each.state_dict())
        if theirs.norm is not None:
            theirs.norm.load_state_dict(norm.state_dict())
    return encoder, decoder


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_outputs_and_gradients_are_those_of_torch(norm: str, activation: str) -> None:
    ours = model(norm=norm, activation=activation, init="normal", init_std=0.3)
    encoder, decoder = torchs(ours)
    real = TARGET != 0
    logits = ours(SOURCE, TARGET)

    def embedded(tokens: Tensor) -> Tensor:
        scaled = ours.target_embedding.weight.detach()[tokens] * 4  # sqrt(dim)
        return scaled + sinusoids(0, tokens.shape[1], 16).double()

    memory = encoder(embedded(SOURCE), src_key_padding_mask=SOURCE == 0)
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    out = decoder(embedded(TARGET), memory, tgt_mask=causal, memory_key_padding_mask=SOURCE == 0)
    expected = F.linear(out, ours.target_embedding.weight.detach())
    torch.testing.assert_close(logits[real], expected[real], **CLOSE)
    logits[real].square().sum().backward()
    expected[real].square().sum().backward()
    for blocks, theirs in ((ours.encoder, encoder), (ours.decoder, decoder)):
        for block, layer in zip(blocks, theirs.layers, strict=True):
            attention = block.attention
            parts = torch.cat([part.weight.grad for part in (attention.query, attention.key, attention.value)])
            torch.testing.assert_close(parts, layer.self_attn.in_proj_weight.grad, **CLOSE)
            torch.testing.assert_close(attention.out.weight.grad, layer.self_attn.out_proj.weight.grad, **CLOSE)
            torch.testing.assert_close(block.mlp.up.weight.grad, layer.linear1.weight.grad, **CLOSE)
            torch.testing.assert_close(block.attention_norm.weight.grad, layer.norm1.weight.grad, **CLOSE)
            if blocks is ours.decoder:
                parts = torch.cat([block.cross_attention.key.weight.grad, block.cross_attention.value.weight.grad])
                torch.testing.assert_close(parts, layer.multihead_attn.in_proj_weight.grad[16:], **CLOSE)


def test_sinusoids_are_the_papers() -> None:
    table = sinusoids(3, 6, 8)
    for row, position in zip(table.tolist(), (3, 4, 5), strict=True):
        for i in range(4):
            angle = position / 10_000 ** (2 * i / 8)
            assert row[2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert row[2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_a_sentence_has_the_same_logits_in_any_batch(norm: str) -> None:
    ours = model(norm=norm)
    together = ours(SOURCE, TARGET)
    for row in range(len(SOURCE)):
        source, target = SOURCE[row][SOURCE[row] != 0], TARGET[row][TARGET[row] != 0]
        alone = ours(source[None], target[None])[0]
        torch.testing.assert_close(together[row, : len(target)], alone, **CLOSE)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_token_by_token_is_the_whole(norm: str) -> None:
    ours = model(norm=norm)
    whole = ours(SOURCE, TARGET)
    cache = Cache()
    steps = [ours(SOURCE, TARGET[:, :2], cache)] + [ours(SOURCE, TARGET[:, i : i + 1], cache) for i in (2, 3)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **CLOSE)
    assert cache.length == 4
    with pytest.raises(ValueError, match="targets come one at a time, got 2"):
        ours(SOURCE, TARGET[:, :2], cache)


def test_rows_of_a_cache_are_kept_or_repeated() -> None:
    ours = model()
    cache = Cache()
    ours(SOURCE, TARGET[:, :2], cache)
    rows = torch.tensor([2, 0, 0])
    cache.select_(rows)
    after = ours(SOURCE[rows], TARGET[rows][:, 2:3], cache)
    torch.testing.assert_close(after, ours(SOURCE, TARGET[:, :3])[rows, 2:3], **CLOSE)
    swapped = Cache()  # two hypotheses of each of two sentences change places
    two = torch.tensor([0, 0, 1, 1])
    target = torch.tensor([[1, 4], [1, 5], [1, 6], [1, 7]])
    ours(SOURCE[two], target, swapped)
    swapped.select_(torch.tensor([1, 1, 3, 2]), same_sources=True)
    following = torch.tensor([[8], [9], [8], [9]])
    expected = ours(SOURCE[two], torch.cat([target[[1, 1, 3, 2]], following], dim=1))[:, 2:]
    torch.testing.assert_close(ours(SOURCE[two], following, swapped), expected, **CLOSE)


@pytest.mark.parametrize(("tied", "weights"), [("all", 1), ("decoder", 2), ("none", 3)])
def test_tied_weights_are_one_parameter(tied: str, weights: int) -> None:
    ours = model(tied=tied)
    named = ("source_embedding", "target_embedding", "head")
    assert len({id(getattr(ours, name).weight) for name in named}) == weights
    of_blocks = 2 * (4 * (16 * 16 + 16) + 8 * 16 * 16 + 5 * 16 + 4 * 16)
    of_blocks += 3 * (8 * (16 * 16 + 16) + 8 * 16 * 16 + 5 * 16 + 6 * 16)
    assert sum(p.numel() for p in ours.parameters()) == of_blocks + weights * 13 * 16


def test_vocabularies_of_two_sizes() -> None:
    ours = model(source_vocab=20, tied="decoder")
    assert ours(SOURCE + 7 * (SOURCE > 2), TARGET).shape == (3, 4, 13)
    assert ours.source_embedding.weight.std().item() == pytest.approx(0.25, rel=0.15)  # of 320 draws of 1 / sqrt(16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_vocab": 14}, "source_vocab 14 and target_vocab 13 must be equal"),
        ({"dim": 18}, "dim 18 is not a multiple of num_heads 4"),
        ({"dim": 3, "num_heads": 3}, "dim must be even"),
        ({"encoder_depth": 0}, "encoder_depth must be at least 1, got 0"),
        ({"tied": "both"}, "tied must be one of all, decoder, none; got 'both'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"embedding_std": 0.0}, "embedding_std must be a positive number"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(SMALL, **changes)


MODELS = [name for name, cls in STABILIZERS.items() if cls.__module__.startswith("trimtab.")]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_every_stabilizer_applies_or_is_refused(name: str, norm: str) -> None:
    ours = model(norm=norm)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    if not changes_models(STABILIZERS[name]()):
        return
    if name == "deepnorm" and norm == "pre":
        with pytest.raises(ConversionError, match="deepnorm needs a LayerNorm after the sum"):
            tt.stabilize_(ours, name, changes_made=True)
        assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
        return
    tt.stabilize_(ours, name, changes_made=True)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    loss = F.cross_entropy(ours(SOURCE, TARGET[:, :-1]).flatten(0, 1), TARGET[:, 1:].flatten(), ignore_index=0)
    loss.backward()
    optimizer.step()
    cache = Cache()  # what is kept is made in the same layers
    steps = torch.cat([ours(SOURCE, TARGET[:, i : i + 1], cache) for i in range(4)], dim=1)
    torch.testing.assert_close(steps, ours(SOURCE, TARGET), **CLOSE)


def test_sigma_takes_every_layer_of_the_blocks_and_leaves_the_tied_embedding() -> None:
    ours = tt.stabilize_(model(), "sigma:gamma_init=one")
    converted = {name for name, module in ours.named_modules() if isinstance(module, Reparametrized)}
    linear = {name for name, module in model().named_modules() if isinstance(module, nn.Linear) and name != "head"}
    assert converted == linear
    assert len(linear) == 2 * 6 + 3 * 10
    separate = tt.stabilize_(model(tied="none"), "sigma:gamma_init=one")
    assert isinstance(separate.head, Reparametrized)


def test_deepnorm_has_the_papers_constants_for_encoder_and_decoder() -> None:
    ours = tt.stabilize_(model(), "deepnorm")
    scales = {name: 1 / float(b) for name, b in ours.named_buffers() if name.endswith("residual_scale")}
    assert len(scales) == 2 * 2 + 3 * 3  # every branch
    for name, alpha in scales.items():
        # figure 2 of arXiv 2203.00555: N = 2 blocks of the encoder, M = 3 of the decoder
        expected = 0.81 * (2**4 * 3) ** (1 / 16) if name.startswith("encoder") else (3 * 3) ** 0.25
        assert alpha == pytest.approx(expected, rel=1e-9)
    assert with_changes(Holder(replace(SMALL, norm="pre")), "deepnorm").model.norm == "post"


@dataclass(frozen=True)
class Holder:
    model: EncoderDecoderConfig


def test_watch_sees_every_head(tmp_path: Any) -> None:
    ours = tt.stabilize_(model().float(), "sigma")
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    with tt.Watch(ours, tmp_path, every=1) as watch:
        loss = F.cross_entropy(ours(SOURCE, TARGET[:, :-1]).flatten(0, 1), TARGET[:, 1:].flatten(), ignore_index=0)
        loss.backward()
        optimizer.step()
        watch.step(loss)
        coverage = watch.coverage()
    assert {row.module for row in coverage if row.seen == "exact"} == {
        *(f"encoder.{i}.attention" for i in range(2)),
        *(f"decoder.{i}.{kind}" for i in range(3) for kind in ("attention", "cross_attention")),
    }
    assert not coverage.unseen, coverage
    assert all(row.heads == 4 for row in coverage)
