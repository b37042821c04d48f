"""What every benchmark shares: machine and versions beside the numbers, medians with their spread, results on disk."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import trimtab
from trimtab.watch.runlog import to_json

RESULTS = Path(os.environ.get("TRIMTAB_RESULTS", Path(__file__).parent / "results"))


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "trimtab": trimtab.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def spread(values: Sequence[float]) -> str:
    """Median, then smallest and largest."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """The mean, and the ends of its interval by Student's t; they are infinite for a single value."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(mean - half), float(mean + half)


def paired(
    first: Callable[[], Any],
    second: Callable[[], Any],
    rounds: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Time both in turn and return the ratios second / first, round by round."""
    for function in (first, second) * 2:
        function()
    ratios = []
    for i in range(rounds):
        # Each goes first every other round, so that a drift of the machine's speed favours neither.
        order = (first, second) if i % 2 == 0 else (second, first)
        seconds = {}
        for function in order:
            seconds[id(function)] = timed(function, device, clock)
        ratios.append(seconds[id(second)] / seconds[id(first)])
    return ratios


def timed(function: Callable[[], Any], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def resident_memory() -> tuple[int, int]:
    """Bytes this process holds in memory now, and the most it ever held (Linux)."""
    # Not ru_maxrss, which a new process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
    sizes = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return int(sizes["VmRSS"].split()[0]) * 1024, int(sizes["VmHWM"].split()[0]) * 1024


def in_child(script: str, *arguments: str, **environment: str) -> Any:
    """Run a benchmark script in a process of its own and return the JSON of the last line it prints."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def rows_so_far(name: str) -> dict[str, Any]:
    """The rows an earlier run left on disk; nothing if it ran on another machine or with other versions."""
    found = read(name)
    rows: dict[str, Any] = found.get("rows", {}) if found.get("machine") == machine() else {}
    return rows


def write(name: str, results: dict[str, Any]) -> Path:
    """Write results as strict JSON, as logs of runs are: "nan", "inf" and "-inf" are strings there."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    aside = path.with_suffix(".part")
    content = json.loads(to_json({"machine": machine(), **results}))
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")
    os.replace(aside, path)
    return path


def read(name: str) -> dict[str, Any]:
    """What `write` has written; {} if there is nothing."""
    path = RESULTS / f"{name}.json"
    content: dict[str, Any] = _numbers(json.loads(path.read_text(encoding="utf8"))) if path.exists() else {}
    return content


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
