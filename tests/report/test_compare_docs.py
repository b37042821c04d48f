"""docs/compare.md says of every column and measure what the code says."""

import re
from pathlib import Path

from run_folders import write_compare

from trimtab.report.collect import collect
from trimtab.report.comparison import comparisons
from trimtab.report.export import RUN_COLUMNS
from trimtab.report.measured import measure_all
from trimtab.report.measures import TOLERANCE

DOCS = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")


def test_every_column_is_documented_in_its_order() -> None:
    table = DOCS.split("`runs.csv`, one row a run:")[1].split("`runs-measures.csv`")[0]
    rows = re.findall(r"^\| (\w+) \| (.+) \|$", table, re.MULTILINE)[1:]
    assert rows == [(name, meaning) for name, (meaning, _) in RUN_COLUMNS.items()]


def test_every_measure_is_documented(tmp_path: Path) -> None:
    runs = {0.1: [1.0], 0.2: [1.0]}
    [found] = comparisons(collect([write_compare(tmp_path / "c", {"none": runs, "sigma": runs})]))
    titles = [each.measure.title.replace("accuracy", "metric") for each in measure_all(found)]
    documented = re.findall(r"^\| ([^|]+) \|", DOCS.split("## Measures")[1].split("##")[0], re.MULTILINE)
    assert {title for cell in documented for title in (cell, *cell.split(", "))} >= set(titles)
    assert f"Tolerance: {TOLERANCE:g}" in DOCS
