import copy
import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab.errors import CheckpointError
from trimtab.reparam import SigmaReparam, fold_, reparametrize_, sigma_gamma
from trimtab.train.average import Average
from trimtab.train.checkpoints import (
    best_checkpoint,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
)
from trimtab.train.checkpoints import files as checkpoint_files
from trimtab.train.state import TrainState
from trimtab.watch import Watch


def plain(seed: int = 0, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, width),
        nn.BatchNorm1d(width),
        nn.GELU(),
        nn.Dropout(0.3),
        nn.Linear(width, width),
        nn.Linear(width, 2),
    )


def converted(seed: int = 0, width: int = 6) -> nn.Sequential:
    return reparametrize_(plain(seed, width))


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Two of them, one with two groups, and a parameter that gets no gradient and so no state."""
    unused = next(reversed(list(model.parameters())))
    unused.requires_grad_(False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 1 and p is not unused]},
        {"params": [unused], "lr": 0.5},
    ]
    return [torch.optim.AdamW(groups, lr=0.01, fused=True), torch.optim.SGD(matrices, lr=0.01, momentum=0.9)]


def state_of(model: nn.Module, watch: Watch | None = None, **options: Any) -> TrainState:
    return TrainState(model, optimizers_of(model), Average(model, 0.9), watch=watch, **options)


def train(state: TrainState, steps: int) -> None:
    """A loop whose every number depends on a generator: torch's (data and dropout), NumPy's and Python's."""
    for _ in range(steps):
        x = torch.randn(8, 3) + random.gauss(0, 0.1) + np.random.standard_normal()
        loss = state.model(x).square().mean()
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in state.optimizers:
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.step()
        state.average.update_()
        state.step += 1


def everything(state: TrainState) -> dict[str, Any]:
    """All that a run is made of, the next numbers of its generators included."""
    return {
        "model": {name: tensor.clone() for name, tensor in state.model.state_dict().items()},
        "average": {name: tensor.clone() for name, tensor in state.average.state_dict().items()},
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in state.optimizers],
        "step": state.step,
        "facts": dict(state.facts),
    }


def numbers() -> list[Any]:
    return [torch.rand(2), random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal()]


def assert_same(one: Any, other: Any) -> None:
    """Equal to the last bit, types included; NaN equals NaN."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(nan=7.5), other.nan_to_num(nan=7.5))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other or (one != one and other != other)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(3)
    np.random.seed(4)


@pytest.mark.parametrize("make", [plain, converted], ids=["plain", "sigma"])
def test_a_run_goes_on_to_the_last_bit(tmp_path: Path, make: Callable[..., nn.Module]) -> None:
    state = state_of(make())
    train(state, 5)
    state.facts = {
        "seconds": 1.25,
        "best": {"eval_loss": float("nan")},
        "alarms": ["é"],
        "at": (1, float("inf")),
        "x": {},
    }
    save_checkpoint(tmp_path, state, keep=2, best=False)
    at_once = everything(state)
    train(state, 5)
    later = everything(state), numbers()

    again = state_of(make(seed=1))
    random.seed(99)
    load_checkpoint(tmp_path / "checkpoints" / "step-00000005", again)
    assert_same(everything(again), at_once)
    train(again, 5)
    assert_same((everything(again), numbers()), later)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    state, other = state_of(converted()), state_of(converted())
    save_checkpoint(tmp_path, state, keep=1, best=True)
    torch.manual_seed(5)
    train(other, 3)
    later = everything(other), numbers()
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    for _ in range(3):
        train(state, 1)
        save_checkpoint(tmp_path, state, keep=1, best=True)
    assert_same((everything(state), numbers()), later)


def test_the_files_are_the_documented_ones(tmp_path: Path) -> None:
    state = state_of(converted())
    train(state, 1)
    save_checkpoint(tmp_path, state, keep=1, best=False)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert folder.name == "step-00000001"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "model.safetensors",
        "optimizer.safetensors",
        "average.safetensors",
        "rng.safetensors",
        "state.json",
    }
    json.loads((folder / "state.json").read_text())


def test_moments_in_another_precision_than_the_weights_are_kept(tmp_path: Path) -> None:
    """torch's own load_state_dict would round them to the weights' type."""

    class Precise(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: None = None) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p]["mean"] = self.state[p].get("mean", torch.zeros(p.shape)) + p.grad.float() / 3
                self.state[p]["kind"] = "slow"

    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    state = TrainState(model, [Precise(model.parameters())])
    model(torch.randn(2, 4, dtype=torch.bfloat16)).sum().backward()
    state.optimizers[0].step()
    save_checkpoint(tmp_path, state, keep=1, best=False)
    again = TrainState(nn.Linear(4, 4, dtype=torch.bfloat16), [])
    again.optimizers = [Precise(again.model.parameters())]
    load_checkpoint(newest_checkpoint(tmp_path), again)
    assert_same(again.optimizers[0].state_dict(), state.optimizers[0].state_dict())
    assert again.optimizers[0].state[again.model.weight]["mean"].dtype == torch.float32


def test_a_gradient_scaler_comes_back(tmp_path: Path) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    state = state_of(plain(), scaler=scaler())
    for _ in range(3):
        loss = state.scaler.scale(state.model(torch.randn(8, 3)).sum())
        loss.backward()
        state.scaler.step(state.optimizers[0])
        state.scaler.update()
    save_checkpoint(tmp_path, state, keep=1, best=False)
    again = state_of(plain(1), scaler=scaler())
    load_checkpoint(newest_checkpoint(tmp_path), again)
    assert again.scaler.state_dict() == state.scaler.state_dict()
    assert again.scaler.get_scale() == 16.0
    with pytest.raises(CheckpointError, match="belongs to another recipe: it has a scaler"):
        load_checkpoint(newest_checkpoint(tmp_path), state_of(plain(1)))


def test_what_wraps_or_compiles_a_model_does_not_show_in_the_names(tmp_path: Path) -> None:
    model = plain()
    state = state_of(model)
    train(state, 1)
    model[4] = torch.compile(model[4], backend="eager")
    assert "4._orig_mod.weight" in model.state_dict()
    state.average = None
    save_checkpoint(tmp_path, state, keep=1, best=False)
    again = state_of(plain(1))
    again.average = None
    load_checkpoint(newest_checkpoint(tmp_path), again)
    assert_same(list(again.model.state_dict().values()), list(model.state_dict().values()))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    model = tied()
    save_checkpoint(tmp_path, TrainState(model, [torch.optim.Adam(model.parameters())]), keep=1, best=False)
    again = tied()
    load_checkpoint(newest_checkpoint(tmp_path), TrainState(again, [torch.optim.Adam(again.parameters())]))
    assert again[1].weight is again[0].weight
    assert torch.equal(again[1].weight, model[0].weight)


# What is refused, before anything is touched


def refused(path: Path, state: TrainState, message: str) -> None:
    before, generators = everything(state), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, state)
    assert_same(everything(state), before)
    assert torch.equal(torch.get_rng_state(), generators)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = state_of(converted())
    train(state, 2)
    save_checkpoint(tmp_path, state, keep=3, best=False)
    return tmp_path / "checkpoints" / "step-00000002"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: state_of(converted(1, width=7)),
            r"another model: 0\.weight is \(6, 3\) float32 in the file and \(7, 3\)",
        ),
        (lambda: state_of(plain(1)), r"another model: 0\.gamma is \(1,\) float32 in the file and absent here"),
        (lambda: state_of(converted(1).double()), r"0\.weight is .* float32 in the file and .* float64 here"),
        (lambda: state_of(nn.Sequential(*converted(1), nn.Linear(2, 2))), r"6\.weight is absent in the file"),
    ],
    ids=["width", "plain", "dtype", "longer"],
)
def test_another_model(saved: Path, other: Callable[[], TrainState], message: str) -> None:
    refused(saved, other(), message)


def test_other_optimizers(saved: Path) -> None:
    state = state_of(converted(1))
    two = state.optimizers
    state.optimizers = two[:1]
    refused(saved, state, "another optimizers: it has 2 of them, here are 1")
    state.optimizers = [two[0], torch.optim.Adam(two[1].param_groups[0]["params"])]
    refused(saved, state, "another optimizer: it is of SGD, here it is Adam")
    state.optimizers = [two[0], torch.optim.SGD(two[1].param_groups[0]["params"][:-1], momentum=0.9)]
    refused(saved, state, r"another optimizer: in parameter group 0 it has 5\.weight where here is no more")
    state.optimizers = [two[0], torch.optim.SGD([nn.Parameter(torch.zeros(3))], momentum=0.9)]
    refused(saved, state, "an optimiser holds a parameter of shape .3,. that the model does not have")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    refused(tmp_path / "step-00000001", state_of(plain()), "there is no checkpoint")
    assert newest_checkpoint(tmp_path) is None
    assert best_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "average.safetensors", "rng.safetensors", "state.json"]
)
@pytest.mark.parametrize("harm", ["empty", "cut", "missing", "flipped"])
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_is_used(
    saved: Path, file: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(converted())
    load_checkpoint(saved, state)
    train(state, 1)
    save_checkpoint(saved.parents[1], state, keep=3, best=False)
    newest = saved.with_name("step-00000003")
    path = newest / file
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-20] ^= 1
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-7], "flipped": bytes(flipped)}[harm])
    refused(newest, state, "step-00000003 is damaged: .*use an earlier one")
    assert newest_checkpoint(saved.parents[1]) == saved
    (record,) = caplog.records
    assert f"step-00000003 is damaged: {file}" in record.message
    assert "Going on from step-00000002" in record.message


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer for once must not cost a run its last checkpoints."""

    def broken(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_files, "_seal", broken)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        newest_checkpoint(saved.parents[1])


def test_something_that_no_file_can_hold(tmp_path: Path) -> None:
    state = state_of(plain())
    state.facts = {"hook": {"here": print}}
    with pytest.raises(CheckpointError, match=r"facts\.hook\.here cannot be saved: expected tensors and plain values"):
        save_checkpoint(tmp_path, state, keep=1, best=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.complex128)],
    ids=["sparse", "meta", "complex128"],
)
def test_a_tensor_that_no_file_can_hold(tmp_path: Path, tensor: Tensor) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", tensor)
    with pytest.raises(CheckpointError, match="mask cannot be saved: expected a dense tensor"):
        save_checkpoint(tmp_path, TrainState(model, []), keep=1, best=False)
    assert not list(tmp_path.iterdir())


# Full disks


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("at", ["save_file", "_seal", "sync"])
def test_a_full_disk_leaves_the_older_checkpoints(saved: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_below(saved.parent)
    state = state_of(converted())
    load_checkpoint(saved, state)
    train(state, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, at, full)
    with pytest.raises(CheckpointError, match=r"No space left on device.* It needs 0\.0 MB"):
        save_checkpoint(saved.parents[1], state, keep=1, best=True)
    assert files_below(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    save_checkpoint(saved.parents[1], state, keep=1, best=True)
    assert newest_checkpoint(saved.parents[1]) == saved.with_name("step-00000003")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_real_limit_on_file_size(saved: Path) -> None:
    import resource

    model = nn.Linear(1000, 100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .* It needs 0\.4 MB"):
            save_checkpoint(saved.parents[1], TrainState(model, [], step=3), keep=1, best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in saved.parent.iterdir()] == ["step-00000002"]
    assert newest_checkpoint(saved.parents[1]) == saved


# Which checkpoints stay


def small(step: int, value: float = 0.0) -> TrainState:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    return TrainState(model, [], step=step, facts={"metrics": {"accuracy": value}})


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_checkpoint(tmp_path, small(step, value=step / 10), keep=2, best=step == 2)
    assert steps_in(tmp_path) == [2, 5, 6]
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {"step": 2, "metrics": {"accuracy": 0.2}}
    save_checkpoint(tmp_path, small(7, value=0.7), keep=2, best=True)
    assert steps_in(tmp_path) == [6, 7]
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["step"] == 7
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "step-00000006",
        "step-00000007",
        "best.json",
    }


def test_what_killed_writers_left_behind_goes_at_the_next_save(tmp_path: Path) -> None:
    for left in ("step-00000004.part", "step-00000002.old.part"):
        (tmp_path / "checkpoints" / left).mkdir(parents=True)
        (tmp_path / "checkpoints" / left / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, small(4), keep=1, best=False)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_run_that_went_back_to_an_earlier_checkpoint_drops_the_damaged_later_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, small(step), keep=3, best=step == 3)
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"step-0000000{step}" / "rng.safetensors").unlink()
    assert best_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, small(2, value=7.0), keep=1, best=False)  # the same step once more
    assert steps_in(tmp_path) == [2]
    again = small(0)
    load_checkpoint(newest_checkpoint(tmp_path), again)
    assert torch.equal(again.model.weight, torch.full((2, 2), 7.0))


def test_the_best_is_known_though_its_pointer_was_never_written(tmp_path: Path) -> None:
    """As after a kill between the renaming of the checkpoint and best.json."""
    save_checkpoint(tmp_path, small(1), keep=1, best=True)
    (tmp_path / "checkpoints" / "best.json").unlink()
    save_checkpoint(tmp_path, small(2), keep=1, best=False)
    save_checkpoint(tmp_path, small(3), keep=1, best=False)
    assert steps_in(tmp_path) == [1, 3]
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["step"] == 1


def test_an_older_checkpoint_that_cannot_be_dropped_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, small(1), keep=1, best=False)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("trimtab.train.checkpoints.kept.os.replace", full)  # of best.json
        save_checkpoint(tmp_path, small(2), keep=1, best=True)
    (record,) = caplog.records
    assert "could not be dropped: [Errno 28] No space left on device" in record.message
    assert newest_checkpoint(tmp_path) == best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    save_checkpoint(tmp_path, small(3), keep=1, best=False)
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["step"] == 2


# Weights alone


def test_weights_alone(saved: Path) -> None:
    state, model = state_of(converted()), converted(1)
    load_checkpoint(saved, state)
    average, generators = state_of(model).average, torch.get_rng_state()
    assert load_weights(saved, model, average) == 2
    assert_same(dict(model.state_dict()), dict(state.model.state_dict()))
    assert_same(average.state_dict(), state.average.state_dict())
    assert torch.equal(torch.get_rng_state(), generators)


def test_plain_weights_load_into_a_converted_model_which_computes_the_rest(tmp_path: Path) -> None:
    model = plain().eval()
    save_checkpoint(tmp_path, TrainState(model, [], step=4), keep=1, best=False)
    other = reparametrize_(plain(1), SigmaReparam("one")).eval()
    assert load_weights(newest_checkpoint(tmp_path), other) == 4
    sigma, gamma = sigma_gamma(other)["4.weight"]
    exact = torch.linalg.matrix_norm(model[4].weight.detach(), 2)
    torch.testing.assert_close((sigma[0], gamma[0]), (exact, exact))
    x = torch.randn(4, 3)
    torch.testing.assert_close(other(x), model(x))


def test_plain_weights_without_direction_leave_the_converted_model_as_it_was(tmp_path: Path) -> None:
    model = plain()
    nn.init.zeros_(model[4].weight)
    save_checkpoint(tmp_path, TrainState(model, []), keep=1, best=False)
    other = converted(1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"(?s)does not fit this model: .*4\.weight comes from a plain checkpoint"
    ):
        load_weights(newest_checkpoint(tmp_path), other)
    assert_same(dict(other.state_dict()), before)


def test_converted_weights_do_not_load_into_plain_layers(saved: Path) -> None:
    folded = fold_(converted())
    with pytest.raises(CheckpointError, match=r"0\.gamma is \(1,\) float32 in the file and absent here"):
        load_weights(saved, folded)


def test_a_checkpoint_of_a_watched_run_needs_a_watch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    model = plain()
    with Watch(model, tmp_path, every=1) as watch:
        state = state_of(model, watch=watch)
        train(state, 1)
        watch.step(1.0)
        save_checkpoint(tmp_path, state, keep=1, best=False)
    with pytest.raises(CheckpointError, match="belongs to another recipe: it has a watch"):
        load_checkpoint(newest_checkpoint(tmp_path), state_of(plain(1)))
