import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.errors import ConversionError, RecipeError
from trimtab.models.speech_encoder import Block, Positions, SpeechEncoder, SpeechEncoderConfig
from trimtab.stabilizers import STABILIZERS, fold_, stabilize_
from trimtab.stabilizers.apply import changes_models

LENGTHS = torch.tensor([11, 13, 1, 6])
FEATURES = torch.randn(4, 13, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(**changes: object) -> SpeechEncoderConfig:
    return replace(SpeechEncoderConfig(5, 7, dim=16, depth=2, num_heads=4, mlp_dim=24), **changes)


def encoder(**changes: object) -> SpeechEncoder:
    torch.manual_seed(0)
    return SpeechEncoder(config(init="normal", init_std=0.3, **changes)).double().eval()


def reference(model: SpeechEncoder, features: Tensor) -> Tensor:
    """Logits (L, V) of one utterance (T, F), pre-LN: frames one by one, one head at a time, the softmax written out."""
    own = model.config
    kernel = model.frames.weight  # (2 D, F, K)
    around = own.kernel // 2
    padded = torch.cat([features.new_zeros(around, 5), features, features.new_zeros(around, 5)])
    rows = []
    for first in range(0, len(features), own.stride):
        seen = padded[first : first + own.kernel]  # (K, F)
        both = torch.einsum("dfk,kf->d", kernel, seen) + model.frames.bias
        rows.append(both[: own.dim] * both[own.dim :].sigmoid())
    x = torch.stack(rows)
    for frame in range(len(x)):
        for pair in range(own.dim // 2):
            angle = (frame - (len(x) - 1) / 2) / 10000 ** (2 * pair / own.dim)
            x[frame, pair] += math.sin(angle)
            x[frame, own.dim // 2 + pair] += math.cos(angle)
    for block in model.blocks:
        y = block.attention_norm(x)
        query, key, value = (getattr(block.attention, name)(y) for name in ("query", "key", "value"))
        mixed = []
        for head in range(own.num_heads):
            part = slice(head * own.dim // own.num_heads, (head + 1) * own.dim // own.num_heads)
            logits = query[:, part] @ key[:, part].T / (own.dim // own.num_heads) ** 0.5
            mixed.append(logits.softmax(dim=-1) @ value[:, part])
        x = x + block.attention.out(torch.cat(mixed, dim=-1))
        x = x + block.mlp.down(block.mlp.up(block.mlp_norm(x)).clamp(min=0))
    return model.head(model.norm(x))


def test_the_forward_is_the_one_written_out_by_hand() -> None:
    model = encoder()
    logits, lengths = model(FEATURES, LENGTHS)
    assert lengths.tolist() == [4, 5, 1, 2]
    for i, length in enumerate(LENGTHS):
        expected = reference(model, FEATURES[i, :length])
        torch.testing.assert_close(logits[i, : lengths[i]], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_an_utterance_has_the_logits_and_gradients_in_a_padded_batch_that_it_has_alone(norm: str) -> None:
    model = encoder(norm=norm)
    padded = FEATURES.clone()
    for i, length in enumerate(LENGTHS):
        padded[i, length:] = 1e6  # whatever lies there

    def gradients(losses: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters())))

    logits, lengths = model(padded, LENGTHS)
    together = [row[:length].square().mean() for row, length in zip(logits, lengths, strict=True)]
    alone = []
    for i, length in enumerate(LENGTHS):
        single, frames = model(FEATURES[i : i + 1, :length], LENGTHS[i : i + 1])
        assert frames.tolist() == [single.shape[1]] == [lengths[i]]
        torch.testing.assert_close(logits[i, : lengths[i]], single[0], rtol=1e-10, atol=1e-10)
        alone.append(single.square().mean())
    torch.testing.assert_close(gradients(together), gradients(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_is_that_of_torch(norm: str) -> None:
    torch.manual_seed(0)
    own = Block(config(norm=norm, bias=True)).double()
    other = nn.TransformerEncoderLayer(16, 4, 24, dropout=0, batch_first=True, norm_first=norm == "pre").double()
    attention = own.attention
    with torch.no_grad():
        for kind in ("weight", "bias"):
            rows = [getattr(getattr(attention, name), kind) for name in ("query", "key", "value")]
            getattr(other.self_attn, f"in_proj_{kind}").copy_(torch.cat(rows))
            for mine, theirs in (
                (attention.out, other.self_attn.out_proj),
                (own.mlp.up, other.linear1),
                (own.mlp.down, other.linear2),
            ):
                getattr(theirs, kind).copy_(getattr(mine, kind))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    visible = torch.arange(9) < torch.tensor([[9], [6]])
    mine, theirs = own(x, visible[:, None, None]), other(x, src_key_padding_mask=~visible)
    torch.testing.assert_close(mine[visible], theirs[visible], rtol=1e-10, atol=1e-10)
    mine[visible].square().sum().backward()
    theirs[visible].square().sum().backward()
    torch.testing.assert_close(own.mlp.up.weight.grad, other.linear1.weight.grad, rtol=1e-9, atol=1e-9)
    packed = torch.cat([getattr(attention, name).weight.grad for name in ("query", "key", "value")])
    torch.testing.assert_close(packed, other.self_attn.in_proj_weight.grad, rtol=1e-9, atol=1e-9)


def places(lengths: list[int], **changes: object) -> Tensor:
    """The positions (B, L) that an encoder of two features adds, in training, read off their sine and cosine."""
    positions = Positions(config(dim=2, num_heads=1, **changes)).double().train()
    added = positions(torch.zeros(len(lengths), max(lengths), 2, dtype=torch.float64), torch.tensor(lengths))
    return torch.atan2(added[..., 0], added[..., 1])  # right within ±π


def test_positions_are_counted_from_the_middle_of_each_utterance() -> None:
    torch.testing.assert_close(places([3, 2])[0], torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(places([3, 2])[1, :2], torch.tensor([-0.5, 0.5], dtype=torch.float64))


def test_positions_shift_jitter_and_scale_in_training_within_their_bounds() -> None:
    torch.manual_seed(0)
    middle = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    shift = places([3] * 500, global_shift=2.0) - middle
    torch.testing.assert_close(shift, shift[:, :1].expand(-1, 3))  # one for an utterance
    assert 1.9 < shift.abs().max() <= 2
    assert abs(shift[:, 0].mean()) < 0.2  # four standard errors of a uniform number
    jitter = places([3] * 500, local_shift=0.4) - middle
    assert 0.39 < jitter.abs().max() <= 0.4
    assert jitter.flatten().unique().numel() == 1500  # one for a frame
    scale = places([3] * 500, global_scale=1.5)
    torch.testing.assert_close(scale[:, 1], torch.zeros(500, dtype=torch.float64))
    assert scale[:, 2].min() == pytest.approx(1 / 1.5, rel=0.02)
    assert scale[:, 2].max() == pytest.approx(1.5, rel=0.02)
    assert scale[:, 2].log().mean().item() == pytest.approx(0, abs=0.05)


def test_residual_sums_are_in_float32_under_autocast_and_halves_are_halves_throughout() -> None:
    model = encoder().float()
    inputs = []
    model.blocks[1].register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
    expected, _ = model(FEATURES.float(), LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = model(FEATURES.float(), LENGTHS)
    halves, _ = model.bfloat16()(FEATURES.bfloat16(), LENGTHS)
    assert inputs == [torch.float32, torch.float32, torch.bfloat16]
    scale = expected.abs().max()
    for found in (mixed, halves):
        assert (found.float() - expected)[0, :4].abs().max() < 0.05 * scale  # 8 bits, through two blocks


def test_nothing_is_random_in_eval_mode_or_moves_the_generator() -> None:
    model = encoder(dropout=0.5, layer_drop=0.5, global_shift=9.0, local_shift=0.4, global_scale=2.0)
    state = torch.get_rng_state()
    assert torch.equal(model(FEATURES, LENGTHS)[0], model(FEATURES, LENGTHS)[0])
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    assert not torch.equal(model(FEATURES, LENGTHS)[0], model(FEATURES, LENGTHS)[0])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_layer_drop_takes_utterances_past_a_block(norm: str) -> None:
    torch.manual_seed(0)
    block = Block(config(norm=norm, layer_drop=0.3)).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64).expand(1000, -1, -1)
    visible = torch.ones(1000, 1, 1, 5, dtype=torch.bool)
    through = block.eval()(x, visible)
    past = x if norm == "pre" else block.mlp_norm(block.attention_norm(x))
    out = block.train()(x, visible)
    dropped = (out - past).abs().amax(dim=(1, 2)) < 1e-12
    taken = (out - through).abs().amax(dim=(1, 2)) < 1e-12
    assert torch.equal(dropped, ~taken)
    assert 0.25 < dropped.double().mean() < 0.35  # 1,000 draws: four standard errors are 0.06
    assert all(parameter.grad is None for parameter in block.parameters())
    block(x[:1], visible[:1]).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
@pytest.mark.parametrize(
    "name",
    [name for name, kind in STABILIZERS.items() if kind.__module__.startswith("trimtab") and changes_models(kind())],
)
def test_every_stabilizer_applies_or_says_why_not(name: str, norm: str) -> None:
    model = encoder(norm=norm)
    before = model(FEATURES, LENGTHS)[0]
    if name == "deepnorm" and norm != "post":
        with pytest.raises(ConversionError, match="post-LN"):
            stabilize_(model, name)
        assert torch.equal(model(FEATURES, LENGTHS)[0], before)
        return
    stabilize_(model.train(), name)
    logits, _ = model(FEATURES, LENGTHS)
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("stabilizer", ["none", "sigma:gamma_init=one"])
def test_watch_sees_every_head_and_sigma_every_weight(stabilizer: str, tmp_path: Path) -> None:
    model = encoder().train()
    stabilize_(model, stabilizer)
    if stabilizer != "none":
        assert str(tt.describe(model)).startswith("14 of 14 weights converted")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with tt.Watch(model, tmp_path, every=1) as watch:
        loss = model(FEATURES, LENGTHS)[0].square().mean()
        loss.backward()
        optimizer.step()
        watch.step(loss)
        coverage = watch.coverage()
    assert {(row.module, row.heads) for row in coverage if row.seen == "exact"} == {
        (f"blocks.{i}.attention", 4) for i in range(2)
    }
    assert not coverage.unseen, coverage


def test_sigma_folds_into_the_same_encoder() -> None:
    model = encoder()
    stabilize_(model, "sigma:gamma_init=one")
    expected = model(FEATURES, LENGTHS)[0]
    plain = encoder()
    plain.load_state_dict(fold_(model).state_dict())
    torch.testing.assert_close(plain(FEATURES, LENGTHS)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 18}, "dim 18"),
        ({"dim": 15, "num_heads": 5}, "dim 15"),
        ({"kernel": 6}, "kernel must be odd"),
        ({"stride": 9}, "at least the stride 9"),
        ({"num_labels": 1}, "num_labels"),
        ({"norm": "rms"}, "norm must be one of pre, post, none"),
        ({"layer_drop": 1.0}, "layer_drop"),
        ({"global_scale": 0.9}, "global_scale must be at least 1"),
        ({"local_shift": -1.0}, "local_shift"),
        ({"init_std": 0.0}, "init_std"),
        ({"depth": 0}, "depth"),
    ],
)
def test_a_wrong_config_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        config(**changes)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected features of shape \(B, T, 5\)"):
        encoder()(FEATURES[..., :4], LENGTHS)
    with pytest.raises(ValueError, match="lengths of shape"):
        encoder()(FEATURES, LENGTHS[:2])
