"""Where else the log of a Watch goes."""

import logging

import torch

from trimtab.watch import Watch


class Keep:
    """A sink that keeps what it gets, and breaks when told to."""

    def __init__(self, breaks_at: int = -1, breaks_closing: bool = False) -> None:
        self.lines, self.closed = [], 0
        self.breaks_at, self.breaks_closing = breaks_at, breaks_closing

    def write(self, line, readings) -> None:
        if line["step"] == self.breaks_at:
            raise OSError("no space left")
        self.lines.append((line, readings))

    def close(self) -> None:
        self.closed += 1
        if self.breaks_closing:
            raise OSError("cannot flush")


def losses(sink: Keep) -> list[float]:
    return [line["loss"] for line, _ in sink.lines]


def test_a_sink_gets_every_logged_line_with_its_alarms_and_heads(tmp_path) -> None:
    sink = Keep()
    with Watch(torch.nn.Linear(2, 2), tmp_path, every=2, sinks=[sink]) as watch:
        for step in range(1, 6):
            watch.attention(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8))
            watch.step(float(step))
        assert sink.closed == 0
    assert losses(sink) == [1.0, 2.0, 4.0]
    assert all("alarms" in line and "time" in line for line, _ in sink.lines)
    assert sink.lines[-1][0] == watch.last
    assert sink.closed == 1


def test_a_sink_that_breaks_is_dropped_and_training_goes_on(tmp_path, caplog) -> None:
    broken, whole = Keep(breaks_at=2), Keep(breaks_closing=True)
    with caplog.at_level(logging.WARNING), Watch(torch.nn.Linear(2, 2), tmp_path, 1, sinks=[broken, whole]) as watch:
        for step in range(1, 5):
            watch.step(float(step))
    assert losses(broken) == [1.0]
    assert losses(whole) == [1.0, 2.0, 3.0, 4.0]
    assert (broken.closed, whole.closed) == (1, 1)
    told = [record.message for record in caplog.records if "Keep" in record.message]
    assert told == [
        "Keep gets nothing from step 2 on: no space left. Training goes on.",
        "Keep could not be closed: cannot flush",
    ]
