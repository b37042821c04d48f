"""Both forms of a step with all that a training loop does between its calls, and steps that are not taken."""

import copy
import gc
import logging
import math
from typing import Any

import pytest
import torch
from sam_models import closure_of, loss_of, net
from torch import Tensor, nn

import trimtab as tt

F32 = torch.float32


def in_two_calls(optimizer: tt.SAM, model: nn.Module, seed: int) -> None:
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    optimizer.first_step()
    loss_of(model, seed).backward()
    optimizer.second_step()


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [tt.SAM, tt.ASAM])
@pytest.mark.parametrize(
    "base", [torch.optim.AdamW, torch.optim.RMSprop, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True)]
)
def test_both_forms_are_one(kind: Any, base: Any) -> None:
    closed, two = net(F32), net(F32)
    first, second = (kind(model.parameters(), base, 0.1, lr=0.02) for model in (closed, two))
    for seed in range(5):
        loss = first.step(closure_of(first, closed, seed))
        assert loss.item() == loss_of(two, seed).item()  # that of the first pass
        in_two_calls(second, two, seed)
        for p, q in zip(closed.parameters(), two.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # those of the second pass, left to be looked at
    assert_equal(closed, two)


def test_micro_batches_and_clipping_between_the_calls() -> None:
    model, whole = net(), net()
    optimizer = tt.SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.5)
    other = tt.SAM(whole.parameters(), torch.optim.SGD, rho=0.2, lr=0.5)
    for step in range(4):
        for end in (optimizer.first_step, optimizer.second_step):
            for part in range(3):
                (loss_of(model, 3 * step + part) / 3).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)  # the first changes nothing
            end()
        optimizer.zero_grad()

        def closure(step: int = step) -> Tensor:
            other.zero_grad()
            loss = sum(loss_of(whole, 3 * step + part) for part in range(3)) / 3
            loss.backward()
            if other.perturbed:
                torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.05)
            return loss

        other.step(closure)
    torch.testing.assert_close(model.state_dict(), whole.state_dict())


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_changes_nothing(clip: float | None, fused: bool) -> None:
    """Its scale is a power of two, and comes out of the gradients before the step, whoever takes it out."""
    scaled, plain = net(F32), net(F32)
    ours, reference = (
        tt.SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.02, fused=fused) for model in (scaled, plain)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for seed in range(5):
        ours.zero_grad()
        scaler.scale(loss_of(scaled, seed)).backward()
        ours.first_step()
        scaler.scale(loss_of(scaled, seed)).backward()
        reference.zero_grad()
        loss_of(plain, seed).backward()
        reference.first_step()
        loss_of(plain, seed).backward()
        if clip is not None:
            scaler.unscale_(ours)
            for model in (scaled, plain):
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(ours)
        scaler.update()
        reference.second_step()
        for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert_equal(scaled, plain)
    assert scaler.get_scale() == 4096  # a step counts once towards its growth
    assert ours.skipped_steps == 0


@pytest.mark.parametrize("broken_pass", [1, 2])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_that_finds_an_overflow(broken_pass: int, unscale: bool) -> None:
    model = net(F32)
    optimizer = tt.SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model)
    for number in (1, 2):
        scaler.scale(loss_of(model)).backward()
        if number >= broken_pass:  # at the weights of the first pass, the second overflows as well
            model[0].weight.grad[0, 0] = math.inf
        if number == 1:
            optimizer.first_step()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_equal(model, before)
    assert optimizer.skipped_steps == 1
    assert not optimizer.state
    assert scaler.get_scale() == 512
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()
    optimizer.first_step()
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    reference = copy.deepcopy(before)
    other = tt.SAM(reference.parameters(), torch.optim.AdamW, rho=0.1, lr=0.02)
    in_two_calls(other, reference, 1)
    assert_equal(model, reference)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("broken_pass", [1, 2])
@pytest.mark.parametrize("closed", [True, False])
def test_a_gradient_that_is_no_direction_skips_the_step(
    value: float, broken_pass: int, closed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    optimizer = tt.SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.02)
    in_two_calls(optimizer, model, 0)
    state, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        loss = loss_of(model)
        (loss * (value if passes == broken_pass else 1.0)).backward()
        return loss

    def step() -> None:
        nonlocal passes
        passes = 0
        if closed:
            optimizer.step(closure)
        else:
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()

    with caplog.at_level(logging.WARNING, "trimtab"):
        step()
        step()
    if value == 0 and broken_pass == 2:  # the step that a plain optimiser takes with it
        assert optimizer.skipped_steps == 0
        assert optimizer.state[model[0].weight]["step"] == 3
        return
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert optimizer.skipped_steps == 2
    words = {0.0: "the gradient is zero, or there is none"}.get(value, "is not finite")
    assert [words in message for message in caplog.messages] == [True]  # told once
    assert passes == (1 if closed and broken_pass == 1 else 2)
    in_two_calls(optimizer, model, 1)
    assert not torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("kind", [tt.SAM, tt.ASAM])
def test_between_the_passes_there_is_one_copy_of_the_weights_and_no_more(kind: Any) -> None:
    def held() -> dict[int, int]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided]
        return {x.data_ptr(): x.numel() for x in tensors if x.device.type == "cpu"}

    weights = [nn.Parameter(torch.randn(100, 7)), nn.Parameter(torch.randn(33))]
    optimizer = kind(weights, torch.optim.SGD, rho=0.1, lr=0.1)
    before = held()
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.first_step()  # clears the gradients
    del weight
    assert sum(size for place, size in held().items() if place not in before) == 733
    optimizer.restore()
    assert held().keys() <= before.keys()


def test_an_error_while_climbing_leaves_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = tt.SAM(weights, torch.optim.SGD, rho=0.1, lr=0.1)
    added = torch._foreach_add_

    def once(tensors: Any, *rest: Any, **more: Any) -> None:
        if tensors[0].dtype == torch.float64:
            raise torch.OutOfMemoryError("no room")
        added(tensors, *rest, **more)

    monkeypatch.setattr(torch, "_foreach_add_", once)
    sum(weight.double().sum() for weight in weights).backward()
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.first_step()
    assert all(bool((weight == 1).all()) for weight in weights)
    assert not optimizer.perturbed


def test_a_gradient_so_small_that_its_inverse_is_no_number_of_the_dtype() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = tt.SAM([weight], torch.optim.SGD, rho=0.5, lr=0.1)
    weight.grad = torch.full_like(weight, 3e-7)  # rho / |g| is 8e5, the largest number of the dtype 65,504
    optimizer.first_step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 1.25), rtol=1e-3, atol=0)  # rho / sqrt(4)
    optimizer.restore()
    assert bool((weight == 1).all())


def test_an_error_inside_a_closure_leaves_weights_and_statistics_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    optimizer = tt.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, model=model)
    before = copy.deepcopy(dict(model.named_parameters()))

    def closure() -> Tensor:
        if optimizer.perturbed:
            raise torch.OutOfMemoryError("no room")
        loss = model(torch.randn(8, 5)).pow(3).mean()
        loss.backward()
        return loss

    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(closure)
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    assert model[1].track_running_stats
    assert model[1].running_mean is not None
    closure()
    optimizer.first_step()
    optimizer.restore()  # the same by hand, in two calls
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    optimizer.restore()


@pytest.mark.parametrize("closed", [True, False])
def test_batch_norm_remembers_the_first_pass_alone(closed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 4, 2), nn.BatchNorm1d(4, momentum=None), nn.GELU(), nn.InstanceNorm1d(4, track_running_stats=True),
        nn.BatchNorm1d(4).eval(), nn.Flatten(), nn.LazyBatchNorm1d(),
    )  # fmt: skip
    x = torch.randn(6, 1, 5)
    model(x)
    single = copy.deepcopy(model)
    optimizer = tt.SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, model=model)
    bare = tt.SAM(single.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)

    def forward(of: nn.Module, which: tt.SAM) -> Tensor:
        which.zero_grad()
        loss = of(x).pow(3).mean()
        loss.backward()
        return loss

    statistics = {}
    for _ in range(2):
        single_pass = copy.deepcopy(single)
        single_pass(x)
        statistics = dict(single_pass.named_buffers())
        if closed:
            optimizer.step(lambda: forward(model, optimizer))
        else:
            forward(model, optimizer)
            optimizer.first_step()
            forward(model, optimizer)
            optimizer.second_step()
        torch.testing.assert_close(dict(model.named_buffers()), statistics, rtol=0, atol=0)
        bare.step(lambda: forward(single, bare))
        single.load_state_dict(model.state_dict() | dict(single.named_parameters()))  # its weights are those of both
    torch.testing.assert_close(dict(model.named_parameters()), dict(single.named_parameters()), rtol=0, atol=0)
    assert int(model[1].num_batches_tracked) == 3


def test_calls_in_the_wrong_order_are_refused() -> None:
    model = net()
    optimizer = tt.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="ends what first_step\\(\\) began, and nothing has"):
        optimizer.step()
    loss_of(model).backward()
    optimizer.first_step()
    for call in (
        optimizer.first_step,
        lambda: optimizer.step(closure_of(optimizer, model)),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: copy.deepcopy(optimizer),
    ):
        with pytest.raises(RuntimeError, match="a step has begun and cannot be"):
            call()
    optimizer.restore()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model).float()).backward()
    with pytest.raises(RuntimeError, match="a GradScaler and a closure do not go together"):
        scaler.step(optimizer, closure_of(optimizer, model))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: tt.SAM(p, torch.optim.SGD(p, 0.1)), TypeError, "class such as torch.optim.AdamW, got SGD"),
        (lambda p: tt.SAM(p, torch.optim.SGD, rho=-1.0, lr=0.1), ValueError, "rho to be a finite number from 0 up"),
        (lambda p: tt.SAM(p, torch.optim.SGD, rho=math.nan, lr=0.1), ValueError, "got nan"),
        (lambda p: tt.SAM(p, torch.optim.SGD, "0.1", lr=0.1), TypeError, "rho to be a number, got '0.1'"),
        (lambda p: tt.SAM([{"params": p, "rho": None}], torch.optim.SGD, lr=0.1), TypeError, "got None"),
        (lambda p: tt.ASAM(p, torch.optim.SGD, eta=-0.1, lr=0.1), ValueError, "eta to be a finite number"),
        (lambda p: tt.SAM(p, torch.optim.LBFGS), TypeError, "LBFGS calls a closure itself"),
        (lambda p: tt.SAM(p, lambda q: tt.SAM(q, torch.optim.SGD, lr=0.1)), TypeError, "SAM calls a closure itself"),
        (lambda p: tt.SAM(p, lambda q: q), TypeError, "it made a list"),
        (lambda p: tt.SAM(p, torch.optim.SGD, lr=0.1, model="net"), TypeError, "nn.Module, got str"),
        (lambda p: tt.SAM(p, torch.optim.SGD, lr=0.1, perturbation="local"), ValueError, "got 'local'"),
        (lambda p: tt.SAM(p[0], torch.optim.SGD, lr=0.1), TypeError, "put it in a list"),
        (lambda p: tt.SAM([], torch.optim.SGD, lr=0.1), ValueError, "empty parameter list"),
    ],
)
def test_wrong_arguments_are_told(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(list(net().parameters()))
