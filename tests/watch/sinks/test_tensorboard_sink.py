import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from trimtab.watch import Watch
from trimtab.watch.alarms import Head, Reading
from trimtab.watch.sinks.scalars import scalars
from trimtab.watch.sinks.tensorboard import TensorBoardSink

LINES = [
    {"step": 1, "loss": 2.5, "lr": [0.1, 0.2], "sigma": {"a": [1.5, 2.5]}, "alarms": []},
    {"step": 20, "loss": math.nan, "lr": [0.1, 0.2], "alarms": [{"kind": "non-finite", "message": "loss is nan"}]},
]
READINGS = {Head("attention", head): Reading(1.0, 0.25 * head, math.inf if head else 3.0) for head in range(4)}


def test_every_line_can_be_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = torch.get_rng_state(), random.getstate()
    sink = TensorBoardSink(tmp_path / "tensorboard")
    sink.write(LINES[0], READINGS)
    sink.write(LINES[1], {})
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # before it is closed: a run may be going on
    sink.close()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()

    def curve(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in found.Scalars(name)]

    assert set(found.Tags()["scalars"]) == {"loss", "lr/0", "lr/1", "sigma/a/0", "sigma/a/1", "alarms"}
    assert curve("sigma/a/1") == [(1, 2.5)]
    assert curve("alarms") == [(1, 0.0), (20, 1.0)]
    assert [step for step, _ in curve("loss")] == [1, 20]
    assert curve("loss")[0] == (1, 2.5)
    assert math.isnan(curve("loss")[1][1])
    (entropies,) = found.Histograms("heads/entropy_normalized")
    assert (entropies.step, entropies.histogram_value.num, entropies.histogram_value.sum) == (1, 4, 1.5)
    (logits,) = found.Histograms("heads/max_logit")
    assert (logits.histogram_value.num, logits.histogram_value.max) == (1, 3.0)
    (text,) = found.Tensors("alarms/non-finite/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (20, b"loss is nan")


def test_a_watched_run_is_the_same_there_as_in_its_log(tiny, train, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    alone, model = tiny(dropout=0.1), tiny(dropout=0.1)
    torch.manual_seed(1)
    train(alone, torch.optim.AdamW(alone.parameters(), lr=1e-2), 4)
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Watch(model, tmp_path / "run", every=2, sinks=[TensorBoardSink(tmp_path / "tensorboard")]) as watch:
        train(model, optimizer, 4, watch.step)
    for expected, got in zip(alone.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, got)

    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    found = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0}).Reload()  # 0: all of them
    drawn = {name: {event.step: event.value for event in found.Scalars(name)} for name in found.Tags()["scalars"]}
    flat = {line["step"]: scalars(line) for line in lines}
    assert sorted(flat) == [1, 2, 4]
    for step, numbers in flat.items():
        there = {name: curve[step] for name, curve in drawn.items() if step in curve}
        assert there == pytest.approx(numbers, rel=1e-7, nan_ok=True)  # TensorBoard keeps float32
    assert [event.step for event in found.Histograms("heads/max_logit")] == [1, 2, 4]


def test_a_process_that_writes_nothing_leaves_no_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    TensorBoardSink(tmp_path / "tensorboard").close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trimtab\[tensorboard\]'"):
        TensorBoardSink(tmp_path)
