"""A watch that goes on from a checkpoint writes what it would have written without the break."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.errors import RunFolderError
from trimtab.watch import Thresholds, Watch
from trimtab.watch.runlog import ARRAYS

# So low that there are alarms at the third line, step 4. One that forgot would raise them later, or once more.
LOW = Thresholds(max_logit=0.05, collapse_entropy=0.999, spike_lines=4, lines=3)


class Kept:
    """A sink that remembers the steps of the lines it was given."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, line: dict[str, Any], readings: object) -> None:
        self.steps.append(line["step"])

    def close(self) -> None:
        pass


class Run:
    """A model with its optimiser, trained on what the global generator draws; two micro-batches a step."""

    def __init__(self, model: nn.Module, loss_of: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self.model, self.loss_of = model, loss_of
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.sink = Kept()
        self.step = 0

    def watch(self, folder: Path, **options: Any) -> Watch:
        return Watch(
            self.model, folder, 2, slow_every=6, thresholds=LOW, on_alarm=lambda _: None, sinks=[self.sink], **options
        )

    def train(self, watch: Watch, until: int) -> None:
        while self.step < until:
            self.step += 1
            self.optimizer.zero_grad()
            for _ in range(2):
                loss = self.loss_of(self.model, torch.randint(11, (4, 9)))
                (loss / 2).backward()
            self.optimizer.step()
            watch.step(loss)

    def state(self, watch: Watch) -> Any:
        parts = (
            self.model.state_dict(),
            self.optimizer.state_dict(),
            watch.state_dict(),
            torch.get_rng_state(),
            self.step,
        )
        return copy.deepcopy(parts)

    def load(self, state: Any, watch: Watch) -> None:
        model, optimizer, watched, generator, self.step = copy.deepcopy(state)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        watch.load_state_dict(watched)
        torch.set_rng_state(generator)


@pytest.fixture
def run(tiny, loss_of) -> Callable[..., Run]:
    def make(converted: bool = False) -> Run:
        model = tiny(dropout=0.1)
        return Run(tt.reparametrize_(model) if converted else model, loss_of)

    return make


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    for line in found:
        del line["time"]
    return found


def tear(folder: Path) -> None:
    """Half a line, half a row, and a row that has no line, as a kill leaves them."""
    with (folder / "steps.jsonl").open("ab") as file:
        file.write(b'{"step": 99, "loss": 1.')
    for name, content in zip(ARRAYS, (b"\0" * 5, b"\0" * 16, b"", b"\0" * 23, b""), strict=True):
        with (folder / name).open("ab") as file:
            file.write(content)


@pytest.mark.parametrize("at", [3, 8], ids=["between lines", "at a line"])
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "sigma"])
def test_the_log_is_that_of_a_run_without_a_break(run, tmp_path, at: int, converted: bool) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    one = run(converted)
    torch.manual_seed(1)
    with one.watch(whole) as watch:
        one.train(watch, 20)
    alarms, last = watch.alarms, watch.last

    two = run(converted)
    torch.manual_seed(1)
    with two.watch(broken) as watch:
        two.train(watch, at)
        state = two.state(watch)
        two.train(watch, 13)  # what comes after the checkpoint is logged already, up to step 12
    tear(broken)
    started = (broken / "run.json").read_bytes()
    three = run(converted)
    with three.watch(broken, resume=True) as watch:
        three.load(state, watch)
        three.train(watch, 20)
        assert watch.coverage().rows
    assert lines(broken) == lines(whole)
    for name in ("heads.json", *ARRAYS):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert (broken / "run.json").read_bytes() == started
    assert watch.alarms == alarms
    assert alarms[0].step == 4
    assert {name: value for name, value in watch.last.items() if name != "time"} == {
        name: value for name, value in last.items() if name != "time"
    }
    assert three.sink.steps == [14, 16, 18, 20]
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), three.model.parameters(), strict=True))


def test_times_go_on(run, tmp_path) -> None:
    one = run()
    with one.watch(tmp_path) as watch:
        one.train(watch, 3)
        state = one.state(watch)
    state[2]["time"] = 1000.0
    two = run()
    with two.watch(tmp_path, resume=True) as watch:
        two.load(state, watch)
        two.train(watch, 4)
    times = [json.loads(line)["time"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert times[:2] == sorted(times[:2])
    assert times[1] < 1000 < times[2]


def test_a_sharpness_that_waits_for_its_line(run, loss_of, tmp_path) -> None:
    one = run()
    with one.watch(tmp_path) as watch:
        one.train(watch, 2)
        batch = torch.randint(11, (4, 9))
        found = watch.sharpness(lambda: loss_of(one.model, batch), optimizer=one.optimizer, iterations=3)
        one.train(watch, 3)
        state = one.state(watch)
    two = run()
    with two.watch(tmp_path, resume=True) as watch:
        two.load(state, watch)
        two.train(watch, 4)
    assert lines(tmp_path)[-1]["sharpness"]["eigenvalue"] == found.eigenvalue


def test_a_folder_without_a_run_starts_one(run, tmp_path) -> None:
    one = run()
    with one.watch(tmp_path / "new", resume=True) as watch:
        one.train(watch, 2)
    assert [line["step"] for line in lines(tmp_path / "new")] == [1, 2]


def test_a_run_that_was_killed_before_its_run_json(run, tmp_path) -> None:
    (tmp_path / "steps.jsonl").touch()
    one = run()
    with one.watch(tmp_path, resume=True, run={"seed": 3}) as watch:
        one.train(watch, 2)
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 3
    assert len(lines(tmp_path)) == 2


@pytest.mark.parametrize("lost", ARRAYS)
def test_rows_that_are_missing_are_nan(run, tmp_path, lost: str) -> None:
    """An array file that lags behind (a disk that lost what was not flushed) has a row for every line again."""
    one = run()
    with one.watch(tmp_path) as watch:
        one.train(watch, 4)
        state = one.state(watch)
    kept = (tmp_path / lost).read_bytes()[:20]
    (tmp_path / lost).write_bytes(kept)
    two = run()
    with two.watch(tmp_path, resume=True) as watch:
        two.load(state, watch)
        two.train(watch, 6)
    for name in ARRAYS:
        rows = torch.frombuffer(bytearray((tmp_path / name).read_bytes()), dtype=torch.float32).view(4, 4)
        assert rows.isnan().all(1).tolist() == ([False, True, True, False] if name == lost else [False] * 4)


def test_damaged_names_of_the_heads_are_told_of_and_nothing_is_touched(run, tmp_path) -> None:
    one = run()
    with one.watch(tmp_path) as watch:
        one.train(watch, 2)
    (tmp_path / "heads.json").write_text('{"heads": [')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunFolderError, match=r"heads\.json, which names the rows .* is damaged"):
        one.watch(tmp_path, resume=True).__enter__()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_resume_a_used_folder_stays_refused(run, tmp_path) -> None:
    one = run()
    with one.watch(tmp_path / "run") as watch:
        one.train(watch, 2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(RunFolderError, match="already holds a run"):
        one.watch(tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


def test_the_state_is_that_of_an_open_watch(run, tmp_path) -> None:
    watch = run().watch(tmp_path)
    with pytest.raises(RuntimeError, match="inside its with block"):
        watch.state_dict()
    with watch:
        state = watch.state_dict()
    with pytest.raises(RuntimeError, match="inside its with block"):
        watch.load_state_dict(state)
