import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab.watch.alarms import Head, Reading
from trimtab.watch.sinks.wandb import WandbSink

READINGS = {Head("attention", head): Reading(1.0, 0.25 * head, 3.0) for head in range(4)}


class OpenRun:
    """What the sink uses of a run that is open already; keeps what it was told."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[str, Any]] = {}
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics[name] = options

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_in_an_open_run_our_names_and_steps_are_our_own() -> None:
    pytest.importorskip("wandb")
    run = OpenRun()
    sink = WandbSink(run=run)
    alarms = [{"message": "first"}, {"message": "second"}]
    sink.write({"step": 20, "loss": math.inf, "sigma": {"a": [1.5]}, "alarms": alarms}, READINGS)
    sink.close()
    assert run.metrics["trimtab/*"] == {"step_metric": "trimtab/step"}
    (logged,) = run.logged
    histogram = logged.pop("trimtab/heads/entropy_normalized")
    assert sum(histogram.histogram) == 4
    assert (histogram.bins[0], histogram.bins[-1]) == (0.0, 0.75)
    del logged["trimtab/heads/max_logit"]
    assert logged == {
        "trimtab/step": 20,
        "trimtab/loss": math.inf,
        "trimtab/sigma/a": 1.5,
        "trimtab/alarms": 2.0,
        "trimtab/alarm": "first\nsecond",
    }
    assert not run.finished


def test_a_process_that_writes_nothing_begins_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    begun: list[dict[str, Any]] = []

    def begin(**options: Any) -> OpenRun:
        begun.append(options)
        return run

    run = OpenRun()
    monkeypatch.setattr(wandb, "init", begin)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # else the sink sets it, for good
    WandbSink("mine").close()
    assert not begun
    sink = WandbSink("mine", mode="online", name="first")
    sink.write({"step": 1}, {})
    sink.write({"step": 2}, {})
    assert begun == [{"project": "mine", "mode": "online", "name": "first"}]
    assert [logged["trimtab/step"] for logged in run.logged] == [1, 2]
    sink.close()
    assert run.finished


OFFLINE = """
import json, random, socket, sys

asked = []
connect, look_up = socket.socket.connect, socket.getaddrinfo

def connecting(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost"):
        note(address)
    return connect(self, address)

def looking_up(host, *rest, **options):
    if host not in (None, "127.0.0.1", "localhost"):
        note(host)
    return look_up(host, *rest, **options)

def note(what):  # at once: the library's last words come after this script's
    asked.append(what)
    print("network:", what, flush=True)

socket.socket.connect, socket.getaddrinfo = connecting, looking_up

import torch
from trimtab.watch.sinks.wandb import WandbSink

state = random.getstate(), torch.get_rng_state().tolist()
sink = WandbSink("tests", dir=sys.argv[1])
for step in range(1, 4):
    sink.write({"step": step, "loss": 1.0 / step}, {})
path = sink._run.dir
sink.close()
assert state == (random.getstate(), torch.get_rng_state().tolist())
print(json.dumps(path))
"""


def test_offline_it_writes_files_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    command = [sys.executable, "-c", OFFLINE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "network:" not in done.stdout
    folder = Path(json.loads(done.stdout.splitlines()[-1])).parent
    assert folder.name.startswith("offline-run-")
    assert list(folder.glob("*.wandb"))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trimtab\[wandb\]'"):
        WandbSink()
