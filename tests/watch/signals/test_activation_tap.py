import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.watch.taps.activations import ActivationTap, residual_blocks


class Block(nn.Module):
    """Not named after anything; returns a tuple, as many do."""

    def __init__(self, mode: str = "plain") -> None:
        super().__init__()
        self.inner, self.mode = nn.Sequential(nn.Linear(6, 6), nn.GELU()), mode

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.mode == "plain":
            return x + self.inner(x), None
        return x + checkpoint(self.inner, x, use_reentrant=self.mode == "reentrant"), None


class Net(nn.Module):
    def __init__(self, output: str = "tensor", mode: str = "plain") -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(mode) for _ in range(3))
        self.head, self.output = nn.Linear(6, 4), output
        self.seen: list[list[Tensor]] = []

    def forward(self, x: Tensor):
        self.seen.append([])
        for layer in self.layers:
            x, _ = layer(x)
            self.seen[-1].append(x.detach().double())
        logits = self.head(x)
        self.seen[-1].append(logits.detach().double())
        forms = {
            "tensor": logits,
            "tuple": (logits, logits.sum()),
            "dict": {"loss": logits.sum(), "logits": logits * 1},
            "attribute": SimpleNamespace(logits=logits * 1),
            "other": logits * 1,
        }
        return forms[self.output]


@pytest.fixture
def tap():
    taps = []

    def make(model, wanted=lambda: True):
        taps.append(ActivationTap(model, wanted))
        return taps[-1]

    yield make
    for each in taps:
        each.close()


def rms(tensors) -> float:
    return torch.stack([tensor.square().mean() for tensor in tensors]).mean().sqrt().item()


@pytest.mark.parametrize("output", ["tensor", "tuple", "dict", "attribute", "other"])
def test_blocks_and_logits_of_several_forwards(tap, output) -> None:
    torch.manual_seed(0)
    model = Net(output)
    seen = tap(model)
    for step in range(2):  # what the first forward has shown is used in the second
        model.seen.clear()
        for size in (1.0, 20.0):
            model(torch.randn(5, 3, 6) * size)
        reading = seen.take()
        assert list(reading.rms) == ["layers.0", "layers.1", "layers.2"]
        for number, name in enumerate(reading.rms):
            assert reading.rms[name] == pytest.approx(rms(each[number] for each in model.seen), rel=1e-5)
        if output == "other":
            assert reading.output_z is None
        else:
            expected = rms(each[3].logsumexp(-1) for each in model.seen)
            assert reading.output_z == pytest.approx(expected, rel=1e-5), step
    assert seen.take() == ({}, None)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant", "around the root"])
def test_recomputed_and_eval_forwards_are_not_counted(tap, mode) -> None:
    torch.manual_seed(0)
    model = Net(mode="plain" if mode == "around the root" else mode)
    seen = tap(model)
    x = torch.randn(5, 3, 6).requires_grad_()
    if mode == "around the root":
        checkpoint(model, x, use_reentrant=False).sum().backward()
    else:
        model(x).sum().backward()
    model.eval()(100 * x)
    model.train()
    reading = seen.take()
    assert reading.rms["layers.2"] == pytest.approx(rms([model.seen[0][2]]), rel=1e-5)
    assert reading.output_z == pytest.approx(rms([model.seen[0][3].logsumexp(-1)]), rel=1e-5)


def test_no_hook_is_there_except_in_forwards_that_are_wanted(tap) -> None:
    model, wanted, hooks = Net(), [True], []
    model.head.register_forward_pre_hook(lambda *_: hooks.append(sum(len(m._forward_hooks) for m in model.modules())))
    seen = tap(model, lambda: wanted[0])
    x = torch.randn(2, 3, 6)
    model(x)
    wanted[0] = False
    model(x)
    wanted[0] = True
    model(x)
    assert hooks == [1 + 3 + 4, 1, 1 + 3 + 1]  # root, blocks, and linear layers till the head is known
    assert len(seen._squares["layers.0"]) == 2
    model.layers[1].forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1
    seen.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model.head)


def test_nothing_lives_longer_and_nothing_changes(tap) -> None:
    """Bit for bit, gradients and random state too."""

    def run(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Net(), nn.Dropout(0.2))
        seen = tap(model) if watched else None
        x = torch.randn(4, 3, 6)
        model(x).square().sum().backward()
        if seen is not None:
            assert not seen._made
            assert not any(value.requires_grad for values in seen._squares.values() for value in values)
        return [*(p.grad for p in model.parameters()), torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_outputs_without_numbers_stop_nothing(tap) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x.long()

    model = nn.Sequential(Odd(), Odd())
    seen = tap(model)
    model(torch.randn(2, 6))
    assert seen.take() == ({}, None)


def test_blocks_that_are_found() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2)
    assert residual_blocks(encoder) == list(encoder.layers)
    whole = nn.Sequential(nn.Linear(8, 8), encoder, nn.Linear(8, 3))
    assert residual_blocks(whole) == list(encoder.layers)
    assert residual_blocks(nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3))) == []
    chain = nn.Sequential(nn.Linear(8, 8), Block(), Block(), nn.Linear(8, 3))
    assert residual_blocks(chain) == [chain[1], chain[2]]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_blocks_of_hugging_face_models() -> None:
    import transformers

    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9))
    assert residual_blocks(gpt) == list(gpt.transformer.h)
    config = transformers.T5Config(d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=2, vocab_size=9)
    t5 = transformers.T5Model(config)
    assert residual_blocks(t5) == [*t5.encoder.block, *t5.decoder.block]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")  # torch.compile's own
def test_compiled_parts_are_not_compiled_again(tap) -> None:
    torch.manual_seed(0)
    model, compiled = Net(), []
    for block in model.layers:
        block.compile(backend=lambda graph, _: compiled.append(1) or graph.forward)
    wanted = [False]
    seen = tap(model, lambda: wanted[0])
    x = torch.randn(4, 3, 6)
    with torch.no_grad():  # tracing through gradients sets off a warning of torch's own
        model(x)
        before = len(compiled)
        wanted[0] = True
        model(x)
    assert before
    assert len(compiled) == before
    assert seen.take() == ({}, None)
    torch._dynamo.reset()


def test_logits_that_come_late_are_found(tap) -> None:
    torch.manual_seed(0)
    model = Net("other")
    seen = tap(model)
    model(torch.randn(5, 3, 6))
    assert seen.take().output_z is None
    model.output = "tensor"
    model(torch.randn(5, 3, 6))
    assert seen.take().output_z == pytest.approx(rms([model.seen[-1][3].logsumexp(-1)]), rel=1e-5)


def test_a_forward_that_failed_and_one_without_gradients_do_not_count(tap) -> None:
    torch.manual_seed(0)
    model = Net()
    seen, x = tap(model), torch.randn(5, 3, 6)
    handle = model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(100 * x)
    handle.remove()
    with torch.no_grad():
        model(100 * x)
    model(x)
    reading = seen.take()
    assert reading.rms["layers.2"] == pytest.approx(rms([model.seen[-1][2]]), rel=1e-5)
    assert reading.output_z == pytest.approx(rms([model.seen[-1][3].logsumexp(-1)]), rel=1e-5)
