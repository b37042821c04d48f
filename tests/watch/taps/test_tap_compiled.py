"""Compiled models: seen on logging steps, compiled once, and trained bit for bit as if nobody watched."""

import contextlib
import copy
import random
import shutil
from collections import UserList
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.watch import Watch
from trimtab.watch.observe import observe
from trimtab.watch.taps import AttentionTap
from trimtab.watch.taps.entries import Entries

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch"),  # torch.compile's own, and this one
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        dropout = 0.2 if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two blocks with all that a second forward could disturb: dropout, BatchNorm, counters, an input changed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Attention(), nn.Dropout(0.3)) for _ in range(2))
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.register_buffer("forwards", torch.zeros(()))
        self.total = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        self.forwards += 1
        self.total = self.total + x.detach().mean()
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x.mean(1)))


def whole(model: Model) -> nn.Module:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def in_place(model: Model) -> nn.Module:
    model.compile(backend="eager")
    return model


def by_block(model: Model) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="eager")
    return model


def wrapped_blocks(model: Model) -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    return model


WAYS = {
    "torch.compile(model)": whole,
    "model.compile()": in_place,
    "block.compile()": by_block,
    "torch.compile(block)": wrapped_blocks,
}
NAMES = ["blocks.0.0", "blocks.1.0"]


class Run:
    """A training run over batches that are the same every time."""

    def __init__(self, called: nn.Module, model: nn.Module) -> None:
        self.called, self.optimizer = called, torch.optim.AdamW(model.parameters(), lr=0.01)
        self.batches = torch.Generator().manual_seed(5)
        torch.manual_seed(1)
        random.seed(1)

    def train(self, steps: int, after: Callable[[Tensor], object] = lambda loss: None) -> None:
        for _ in range(steps):
            loss = self.called(torch.randn(4, 6, 16, generator=self.batches)).square().sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            after(loss)


def made(way: Callable[[Model], nn.Module]) -> tuple[Model, nn.Module]:
    torch.manual_seed(0)
    model = Model()
    return model, way(model)


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], Tensor, float]:
    """All numbers that the model keeps, and what the random generators give next."""
    return copy.deepcopy(model.state_dict()) | {"total": model.total}, torch.rand(3), random.random()


@pytest.mark.parametrize(
    ("way", "watched_by"),
    [*((way, "what is called") for way in WAYS), ("torch.compile(model)", "what it was made from")],
)
def test_seen_never_compiled_again_and_bit_identical(tmp_path, way, watched_by) -> None:
    """Seven steps three times: watched from the first, which compiles; watched for some in between; never watched."""
    model, called = made(WAYS[way])
    watched = called if watched_by == "what is called" else model
    start = copy.deepcopy(model.state_dict())

    def seen_on_logged_steps(run: Run, steps: int, watch: Watch) -> None:
        def step(loss: Tensor) -> None:
            logged = watch.next_step_is_logged
            watch.step(loss)
            if logged:
                assert watch.last["max_logit"] > 0
                assert [row.module for row in watch.coverage() if row.seen == "exact"] == NAMES

        run.train(steps, step)

    run = Run(called, model)
    with Watch(watched, tmp_path / "first", every=2) as watch:
        seen_on_logged_steps(run, 1, watch)
        compiled = compilations()
        assert compiled > 0
        with torch._dynamo.config.patch(error_on_recompile=True):
            seen_on_logged_steps(run, 4, watch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run.train(2)
        ends = [state_of(model)]

        model.load_state_dict(start)
        model.total = torch.zeros(())
        run = Run(called, model)
        run.train(2)
        with Watch(watched, tmp_path / "second", every=2) as watch:
            seen_on_logged_steps(run, 3, watch)
        run.train(2)
        ends.append(state_of(model))

        model.load_state_dict(start)
        model.total = torch.zeros(())
        run = Run(called, model)
        run.train(7)
        unwatched = state_of(model)
    assert compilations() == compiled
    for state, tensors, number in ends:
        assert all(torch.equal(state[name], unwatched[0][name]) for name in state)
        assert torch.equal(tensors, unwatched[1])
        assert number == unwatched[2]


def test_the_numbers_are_those_of_the_eager_model(tmp_path) -> None:
    model, called = made(whole)
    x = torch.randn(4, 6, 16)
    for part in (model.eval(), called.eval()):
        tap = AttentionTap(part, lambda: True)
        called(x.clone())
        seen = tap.take()
        tap.close()
        with observe(model) as expected:
            model(x.clone())
        assert list(seen) == list(expected.heads) == NAMES
        for name in NAMES:
            assert torch.equal(seen[name].entropy, expected.heads[name].entropy)


def test_an_object_that_a_forward_changes_is_lent_as_a_copy() -> None:
    class Remembers(nn.Module):
        def forward(self, x: Tensor, cache: list) -> Tensor:
            cache[0].append(x)
            return F.scaled_dot_product_attention(x, x, cache[0][-1])

    class Cache(UserList):
        """No container that torch knows."""

    called, cache = torch.compile(Remembers(), backend="eager"), Cache()
    tap = AttentionTap(called, lambda: True)
    called(torch.randn(2, 3, 5, 8), [cache])
    assert list(tap.take()) == ["(root)"]
    assert len(cache) == 1
    tap.close()


def test_compiled_code_that_is_run_in_eager_mode_after_all_is_counted_once() -> None:
    """By the user's wish, or when torch gives up compiling: then hooks of the model run inside the compiled call."""
    model, called = made(whole)
    tap = AttentionTap(model, lambda: True)
    with torch.compiler.set_stance("force_eager"):
        called(torch.randn(4, 6, 16))
    assert {name: len(stats) for name, stats in tap._training.stats.items()} == dict.fromkeys(NAMES, 1)
    tap.take()
    model(torch.randn(4, 6, 16))  # not through the compiled copy
    assert list(tap.take()) == NAMES
    tap.close()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_that_look_at_a_model_compiled_in_place_leave_in_any_order(order) -> None:
    model, _ = made(in_place)
    compiled_call, seen = model._compiled_call_impl, []

    def entries(who: str) -> Entries:
        return Entries(model, lambda *_: None, lambda: None, lambda *_: seen.append(who), lambda: seen.append("left"))

    both = [entries("first"), entries("second")]
    for each in both:
        each.renew()  # nothing new: they find themselves
    model._compiled_call_impl.inner.inner = lambda x: x
    model(torch.zeros(2))
    assert seen == ["second", "first", "left", "left"]
    model._compiled_call_impl.inner.inner = compiled_call
    for index in order:
        both[index].remove()
    assert model._compiled_call_impl is compiled_call


def test_compiled_after_the_watch_began(tmp_path) -> None:
    """The first logged step sees nothing, and looks again for what has been compiled since."""
    torch.manual_seed(0)
    model = Model()
    tap = AttentionTap(model, lambda: True)
    called = torch.compile(model, backend="eager")
    called(torch.randn(2, 6, 16))
    assert tap.take() == {}
    called(torch.randn(2, 6, 16))
    assert list(tap.take()) == NAMES
    tap.close()


def test_a_compiled_function_in_the_models_file(monkeypatch) -> None:
    """Eager code around it; it is not compiled again, and what it calls is seen."""

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return globals()["compiled_attention"](x)

    monkeypatch.setitem(globals(), "compiled_attention", torch.compile(attend, backend="eager"))
    model, x = Calls(), torch.randn(2, 3, 5, 8)
    tap = AttentionTap(model, lambda: wanted)
    wanted = False
    model(x)
    before = compilations()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for wanted in (True, False, True):
            model(x)
            assert list(tap.take()) == (["(root)"] if wanted else [])
    tap.close()
    assert compilations() == before


def test_an_eager_forward_that_fails_is_told_and_training_goes_on(tmp_path) -> None:
    class Shy(Model):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise ValueError("only with gradients")
            return super().forward(x)

    torch.manual_seed(0)
    model = Shy()
    called = torch.compile(model, backend="eager")
    with Watch(called, tmp_path, every=1) as watch:
        Run(called, model).train(2, watch.step)
        unseen = watch.coverage().unseen
    assert unseen.keys() == set(NAMES)
    assert "only with gradients" in unseen[NAMES[0]]


def test_observe_runs_a_compiled_model_eagerly() -> None:
    for way in WAYS.values():
        _, called = made(way)
        with observe(called) as seen:
            called(torch.randn(2, 6, 16))
        assert list(seen.heads) == NAMES
        assert compilations() == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on CPU")
def test_inductor(tmp_path) -> None:
    """The real compiler, once: the same compiled function trains the same weights unwatched, then watched."""
    torch.manual_seed(0)
    model = Attention()
    start = copy.deepcopy(model.state_dict())
    called = torch.compile(model)
    ends = []
    for watch in (None, Watch(called, tmp_path, every=2)):
        model.load_state_dict(start)
        with contextlib.nullcontext() if watch is None else watch:
            Run(called, model).train(3, lambda loss, watch=watch: watch and watch.step(loss))
        ends.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    assert "max_logit" in watch.last
    assert compilations() == 1


def test_a_model_compiled_after_lines_without_a_forward_is_seen() -> None:
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # imports what compiling needs
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    tap = AttentionTap(model, lambda: True)
    assert tap.take() == {}
    model.compile(backend="eager")
    model(torch.randn(2, 5, 8))
    assert tap.take() == {}  # the first time it is only noticed
    model(torch.randn(2, 5, 8))
    assert list(tap.take()) == ["self_attn"]
    tap.close()
