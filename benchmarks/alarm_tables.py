"""The tables of docs/alarms.md, from what alarms.py found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- tables of benchmarks/alarms.py -->", "<!-- end of tables -->"
_HEAD = """| {} | failed | predicted | predicted, later on | too late | healthy | alarmed | median lead |
|---|---|---|---|---|---|---|---|"""


def tables(results: Mapping[str, Any]) -> str:
    """Markdown: runs by task; the held-out tasks; every kind; the groups; fewer lines; the controls."""
    splits = results["splits"]
    parts = [
        _runs(results["runs"]),
        _table("task held out", {task: split["scores"]["predictive"] for task, split in splits.items()}),
        _table("fitted without", {task: _words(split["fitted"]) for task, split in splits.items()}, "thresholds"),
        _table("fitted on all tasks", results["all"]),
        _table("predictive alarms, runs", results["groups"]),
        _table(
            "predictive alarms, lines read",
            {f"every {n}" if n != "1" else "all": s for n, s in results["thinned"].items()},
        ),
        _controls("control", results["controls"]),
        _controls("control, runs with neither", results["controls with neither"]),
        _table("fitted on all", {"all tasks": _words(results["fitted"])}, "thresholds"),
        _table("kind", results["confidence"], "confidence"),
    ]
    return "\n\n".join(parts)


def write_into(page: Path, results: Mapping[str, Any]) -> None:
    """Replace what stands between the two marks of a page by the tables."""
    text = page.read_text(encoding="utf8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{after}", encoding="utf8")


def _runs(rows: list[dict[str, Any]]) -> str:
    lines = ["| task | runs | healthy | impaired | failed |", "|---|---|---|---|---|"]
    tasks = list(dict.fromkeys(row["run"].split("_")[0] for row in rows))
    for task in [*tasks, ""]:
        ends = [row["outcome"] for row in rows if row["run"].startswith(task)]
        counts = " | ".join(str(ends.count(end)) for end in ("healthy", "impaired", "failed"))
        lines.append(f"| {task or 'all'} | {len(ends)} | {counts} |")
    return "\n".join(lines)


def _controls(title: str, found: Mapping[str, Any]) -> str:
    return _table(title, {f"{name} > {score['bound']:.3g}": score for name, score in found.items()})


def _table(title: str, rows: Mapping[str, Any], value: str = "") -> str:
    if value:
        head = f"| {title} | {value} |\n|---|---|"
        return "\n".join([head, *(f"| {name} | {words} |" for name, words in rows.items())])
    return "\n".join([_HEAD.format(title), *(_score(name, score) for name, score in rows.items())])


def _score(name: str, score: Mapping[str, Any]) -> str:
    lead = (
        "–" if score["lead_steps"] is None else f"{score['lead_steps']:.0f} steps, {score['lead_share']:.0%} of the run"
    )
    shares = [score["failed"], *map(_share, (score["recall"], score["recall_later"])), score["late"], score["healthy"]]
    return f"| {name} | " + " | ".join(map(str, shares)) + f" | {_share(score['false_alarms'])} | {lead} |"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _words(fitted: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in fitted.items())
