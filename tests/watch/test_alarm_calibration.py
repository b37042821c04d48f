"""What the code and the docs say of the alarms is what benchmarks/alarms.py found."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from trimtab.watch.alarms import CONFIDENCE, KINDS, Thresholds

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "alarms.json").read_text(encoding="utf8"))


def test_thresholds_and_confidence_are_those_that_were_found(results: dict[str, Any]) -> None:
    assert asdict(Thresholds()) == results["thresholds"]
    assert results["confidence"] == CONFIDENCE
    assert set(CONFIDENCE) <= set(KINDS)


def test_the_tallies_follow_from_the_runs(results: dict[str, Any]) -> None:
    runs = results["runs"]
    assert len({run["run"] for run in runs}) == len(runs) >= 60
    assert {run["run"].split("_")[0] for run in runs} == {"digits", "shakespeare", "reverse"}
    predictive = {"entropy collapse", "logit growth", "sigma growth", "large updates", "dead head"}
    failed = [run for run in runs if run["outcome"] == "failed"]
    healthy = [run for run in runs if run["outcome"] == "healthy"]
    first = {run["run"]: min((run["alarms"][k] for k in predictive & set(run["alarms"])), default=None) for run in runs}
    predicted = sum(first[run["run"]] is not None and first[run["run"]] < run["failed_at"] for run in failed)
    alarmed = sum(first[run["run"]] is not None for run in healthy)
    found = results["all"]["predictive"]
    assert (found["failed"], found["healthy"]) == (len(failed), len(healthy))
    assert found["recall"] == pytest.approx(predicted / len(failed), abs=5e-4)  # three decimals are kept
    assert found["false_alarms"] == pytest.approx(alarmed / len(healthy), abs=5e-4)


def test_the_docs_show_the_tables(results: dict[str, Any]) -> None:
    spec = importlib.util.spec_from_file_location("alarm_tables", ROOT / "benchmarks" / "alarm_tables.py")
    assert spec is not None
    assert spec.loader is not None
    alarm_tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alarm_tables)
    assert alarm_tables.tables(results) in (ROOT / "docs" / "alarms.md").read_text(encoding="utf8")
