"""Which forwards count, and what a program tells of its attention itself."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.attention import attention_stats_reference
from trimtab.watch.observe import observe
from trimtab.watch.taps import AttentionTap


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query = self.linear(x)[:, None]
        return F.scaled_dot_product_attention(query, query, query)[:, 0]


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 8)


def test_evaluation_counts_when_gradients_are_on_and_nothing_was_trained(x) -> None:
    """People fine-tune in eval mode; an evaluation between steps is without gradients."""
    model = nn.Sequential(Attention())
    tap = AttentionTap(model, lambda: True)
    with torch.no_grad():
        model.eval()(x)
    assert tap.take() == {}
    model(x)
    assert list(tap.take()) == ["0"]
    model(50 * x)
    model.train()(x)
    model.eval()(50 * x)
    largest = attention_stats_reference(*[model[0].linear(x)[:, None]] * 2).max_logit.max().item()
    assert tap.take()["0"].max_logit == pytest.approx([largest], rel=1e-5)
    assert tap.take() == {}
    tap.close()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_every_block_recomputed_is_counted_once(x, use_reentrant) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Attention(), Attention()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant).sin()
            return x

    model = Checkpointed()
    tap = AttentionTap(model, lambda: True)
    for micro_batch in (x, 2 * x):
        model(micro_batch.requires_grad_()).sum().backward()
        x = x.detach()
    assert {name: len(stats) for name, stats in tap._training.stats.items()} == {"blocks.0": 2, "blocks.1": 2}
    tap.close()


def test_copies_and_pickles_of_a_watched_model_are_not_watched(x) -> None:
    model = nn.Sequential(Attention())
    tap = AttentionTap(model, lambda: True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(x)
        assert tap.take() == {}
    model(x)
    assert list(tap.take()) == ["0"]
    tap.close()


class ByHand(nn.Module):
    """Attention written out; tells the tap of it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tell = lambda *_, **__: None
        self.name = None

    def forward(self, x: Tensor) -> Tensor:
        query, key = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q_proj, self.k_proj))
        self.tell(query, key, name=self.name, scale=0.3)
        return ((query @ key.mT * 0.3).softmax(-1) @ key).transpose(1, 2).flatten(2)


def test_attention_told_by_the_program(x) -> None:
    model = nn.ModuleDict({"own": ByHand()})
    model.forward = lambda x: model["own"](x)
    tap = AttentionTap(model, lambda: True)
    model(x)
    assert tap.take() == {}
    assert "watch.attention" in tap.coverage().unseen["own"]
    model["own"].tell = tap.record
    own = model["own"]
    query, key = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (own.q_proj, own.k_proj))
    expected = attention_stats_reference(query, key, scale=0.3).entropy.mean((0, 2))
    for name in (None, "mine"):
        own.name = name
        model(x)
        found = tap.take()
        assert list(found) == [name or "own"]
        assert found[name or "own"].entropy == pytest.approx(expected.tolist(), abs=1e-5)
    assert [(row.module, row.seen) for row in tap.coverage()] == [("own", "exact"), ("mine", "exact")]
    with torch.no_grad():
        model.eval()(x)
    tap.record(query, key)  # no forward is running
    assert tap.take() == {}
    tap.close()


def test_a_program_that_tells_of_one_example_tells_of_its_heads() -> None:
    class OneExample(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            tap.record(query, key)
            return query

    query, key, model = torch.randn(3, 4, 8), torch.randn(3, 6, 8), OneExample()
    tap = AttentionTap(model, lambda: True)
    model(query, key)
    expected = attention_stats_reference(query, key).entropy.mean(-1)  # (H,)
    assert tap.take()["(root)"].entropy == pytest.approx(expected.tolist(), abs=1e-5)
    tap.close()


def test_told_shapes_that_do_not_fit_are_an_error_there_and_then(x) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tap.record(x, x[..., :3])
            return x

    model = Wrong()
    tap = AttentionTap(model, lambda: True)
    with pytest.raises(ValueError, match=r"same, positive D .* got query \(2, 5, 8\) and key \(2, 5, 3\)"):
        model(x)
    tap.close()


def test_several_forwards_are_averaged_by_observe(x) -> None:
    model = nn.Sequential(Attention())
    alone = []
    for size in (1, 3):
        with observe(model) as seen:
            model(size * x)
        alone.append(seen.heads["0"])
    with torch.no_grad(), observe(model.eval()) as both:
        model(x)
        model(3 * x)
    assert list(both.heads) == ["0"]
    torch.testing.assert_close(both.heads["0"].entropy, (alone[0].entropy + alone[1].entropy) / 2)
    assert torch.equal(both.heads["0"].max_logit, alone[1].max_logit)


def test_observe_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module, got function"), observe(lambda x: x):
        pass


def test_a_forward_without_gradients_does_not_count_beside_training(x) -> None:
    """A rollout in training mode, token by token."""
    model = nn.Sequential(Attention())
    tap = AttentionTap(model, lambda: True)
    with torch.no_grad():
        model(50 * x)
    model(x)
    with torch.no_grad():
        model(60 * x)
    largest = attention_stats_reference(*[model[0].linear(x)[:, None]] * 2).max_logit.max().item()
    assert tap.take()["0"].max_logit == pytest.approx([largest], rel=1e-5)
    with torch.no_grad():
        model(x)
    assert tap.take()["0"].max_logit == pytest.approx([largest], rel=1e-5)
    tap.close()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("handled", [False, True], ids=["", "inside an except clause"])
def test_a_forward_that_failed_does_not_count(x, error, handled) -> None:
    """Out of memory, then a smaller batch; Ctrl-C in a notebook, then on."""

    class Fails(nn.Module):
        fails = True

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise error
            return x

    model = nn.Sequential(Attention(), Fails())
    tap = AttentionTap(model, lambda: True)

    def attempts() -> None:
        with pytest.raises(error):
            model(50 * x)
        F.scaled_dot_product_attention(*[70 * x[:, None]] * 3)  # somebody else's
        model[1].fails = False
        model(x)

    if handled:
        try:
            raise ValueError
        except ValueError:
            attempts()
    else:
        attempts()
    largest = attention_stats_reference(*[model[0].linear(x)[:, None]] * 2).max_logit.max().item()
    seen = tap.take()
    assert list(seen) == ["0"]
    assert seen["0"].max_logit == pytest.approx([largest], rel=1e-5)
    model[1].fails = True
    with pytest.raises(error):
        model(x)
    assert tap.take() == {}
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    tap.close()


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (("a", torch.ones(1, 1, 2, 4)), {}, "query to be a tensor, got str"),
        ((torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)), {"name": 3}, "name to be a string or None, got 3"),
        ((torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)), {"causal": True}, "attn_mask, is_causal.*; got causal"),
    ],
)
def test_what_a_program_tells_wrongly_is_refused(arguments, options, says) -> None:
    class Told(nn.Module):
        def forward(self) -> None:
            tap.record(*arguments, **options)

    model = Told()
    tap = AttentionTap(model, lambda: True)
    with pytest.raises(TypeError, match=says):
        model()
    tap.close()
