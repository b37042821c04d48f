import gc
import weakref

import pytest
import torch
from torch import nn

from trimtab.watch.taps import optimizer as tap_module
from trimtab.watch.taps.optimizer import OptimizerTap


@pytest.fixture
def tap():
    taps = []

    def make(model, wanted=lambda: True):
        taps.append(OptimizerTap(model, wanted))
        return taps[-1]

    yield make
    for each in taps:
        each.close()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"words": nn.Embedding(7, 4), "line": nn.Linear(4, 3), "norm": nn.LayerNorm(3)})


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def relative(model: nn.Module, before: dict) -> dict:
    """Of every parameter of two or more dimensions, in float64."""
    return {
        name: ((p.double() - before[name].double()).norm() / before[name].double().norm()).item()
        for name, p in model.named_parameters()
        if p.ndim >= 2
    }


def copies(model: nn.Module) -> dict:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_update_ratios_of_each_weight_over_the_step(tap) -> None:
    model = with_gradients(net())
    seen, before = tap(model), copies(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer.step()
    ratios = seen.take().update_ratio
    assert list(ratios) == ["words.weight", "line.weight"]
    assert ratios == pytest.approx(relative(model, before), rel=1e-4)  # differences of float32 numbers
    assert seen.take() is None


def test_gradient_variance_by_block_and_by_module_outside(tap) -> None:
    """Of a block whose parameters two optimisers hold it is one number; the scale of a GradScaler is taken out."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)
    model = with_gradients(nn.ModuleDict({"words": nn.Embedding(7, 4), "encoder": encoder}))
    seen = tap(model)
    matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], lr=0.0)
    vectors = torch.optim.SGD([p for p in model.parameters() if p.ndim == 1], lr=0.0, fused=True)
    vectors.grad_scale, vectors.found_inf = torch.tensor(4.0), torch.tensor(0.0)  # as a GradScaler sets them
    for parameter in vectors.param_groups[0]["params"]:
        parameter.grad *= 4
    vectors.step()  # which divides the gradients
    matrices.step()
    expected = {}
    for name in ("words", "encoder.layers.0", "encoder.layers.1"):
        parameters = model.get_submodule(name).parameters()
        flat = torch.cat([p.grad.flatten() for p in parameters])
        expected[name] = flat.double().numpy().var()
    assert seen.take().grad_variance == pytest.approx(expected, rel=1e-6)


def test_two_optimizers_and_two_steps(tap) -> None:
    """Each weight is its own optimiser's; of several steps the last is told."""
    model = with_gradients(net())
    words = torch.optim.SGD(model["words"].parameters(), lr=0.5)
    rest = torch.optim.SGD([*model["line"].parameters(), *model["norm"].parameters()], lr=0.1)
    seen = tap(model)
    words.step()
    before = copies(model)
    words.step()
    rest.step()
    reading = seen.take()
    assert reading.update_ratio == pytest.approx(relative(model, before), rel=1e-4)
    assert reading.lr == [0.5, 0.1]


class Twice(torch.optim.Optimizer):
    """Wraps another, and moves the weights on its own after it."""

    def __init__(self, inner) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self) -> None:
        self.inner.step()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.5)


def test_a_wrapped_optimizer_counts_as_a_whole(tap) -> None:
    model = with_gradients(net())
    seen, before = tap(model), copies(model)
    Twice(torch.optim.SGD(model.parameters(), lr=0.1)).step()
    assert seen.take().update_ratio == pytest.approx(relative(model, before), rel=1e-4)


def test_closures(tap) -> None:
    model = net()
    seen, before = tap(model), copies(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model["line"](model["words"].weight).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    reading = seen.take()
    assert reading.update_ratio == pytest.approx(relative(model, before), rel=1e-4)
    assert reading.grad_norm > 0


def test_skipped_steps_zero_weights_and_frozen_ones(tap) -> None:
    model = with_gradients(net())
    seen = tap(model)
    with torch.no_grad():
        model["line"].weight.zero_()
    model["words"].weight.requires_grad_(False)
    model["words"].weight.grad = None
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(torch.ones(1))
    model["norm"].weight.grad[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert seen.take() is None
    model["norm"].weight.grad[0] = 1
    optimizer.step()
    assert seen.take().update_ratio == {"words.weight": 0.0}  # the other was zero: any update is infinitely large


def test_copies_live_no_longer_than_the_step(tap, monkeypatch) -> None:
    model, refs = with_gradients(net()), []
    seen = tap(model)
    ratios = tap_module._update_ratios

    def noted(held):
        refs.extend(weakref.ref(copy) for _, copy in held.values())
        return ratios(held)

    monkeypatch.setattr(tap_module, "_update_ratios", noted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    gc.collect()
    assert len(refs) == 2
    assert not any(ref() for ref in refs)

    class Broken(torch.optim.SGD):
        def step(self):
            raise ZeroDivisionError

    broken = Broken(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError):
        broken.step()
    assert seen._before
    assert seen.take().update_ratio  # of the step that went well
    assert not seen._before
    optimizer.step()  # and the weights of the broken one are followed again
    assert set(seen.take().update_ratio) == {"words.weight", "line.weight"}


def test_no_copy_is_made_when_memory_runs_out_or_nothing_is_wanted(tap, monkeypatch) -> None:
    model = with_gradients(net())
    before = copies(model)
    quiet, seen = tap(model, lambda: False), tap(model)

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "clone", full)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    monkeypatch.undo()
    reading = seen.take()
    assert reading.update_ratio == {}
    assert reading.lr == [0.1]
    assert quiet.take() is None
    assert relative(model, before)["line.weight"] > 0
