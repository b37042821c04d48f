"""The log of a run as columns of numbers, fast enough for hundreds of runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.report.runlog import Floats, number


def read_columns(path: Path) -> tuple[dict[str, Floats], list[dict[str, Any]], list[str]]:
    """Read steps.jsonl for its plain numbers; what stands by weight is left out.

    Args:
        path: the file; one that is not there has no line.

    Returns:
        The numbers by name, (lines,) each, NaN where a line has none; every alarm; and what was wrong with the file.
    """
    texts = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # the last is torn or empty
    notes: list[str] = []
    try:
        lines = _lines(b"[" + b",".join(texts) + b"]")  # many times faster than line by line
    except (ValueError, TypeError):
        whole = 0
        lines = []
        for text in texts:
            try:
                lines += _lines(b"[" + text + b"]")
            except (ValueError, TypeError):
                break
            whole += 1
        notes.append(f"steps.jsonl is damaged after line {whole}; what follows is left out")
    alarms = [dict(alarm) for line in lines if line.get("alarms") for alarm in line["alarms"]]
    kinds = {name: value for line in reversed(lines) for name, value in line.items()}  # the first value of each name
    columns = {name: _column(lines, name) for name, value in kinds.items() if _is_number(name, value)}
    return columns, alarms, notes


def _lines(text: bytes) -> list[dict[str, Any]]:
    lines = json.loads(text)
    for line in lines:
        if not isinstance(line, dict) or not isinstance(line.get("step"), int | float):
            raise ValueError("a line without a step")
    return list(lines)


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> Floats:
    values = [line.get(name) for line in lines]
    if not any(isinstance(value, list) for value in values):
        return np.array(values, dtype=np.float64)  # None becomes NaN, "inf" what it says
    return np.array([number(value) for value in values])


def _is_number(name: str, value: Any) -> bool:
    if name in ("alarms", "time"):
        return False
    if isinstance(value, list):
        return name == "lr"  # the learning rate of each group of parameters: the first stands for them
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")
