"""The curves of every run, compact, for the page that draws them on a click."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.report.looks import Look
from trimtab.report.page import FAINT, axis, chart
from trimtab.report.runlog import Floats
from trimtab.report.summary import RunSummary

_MESSAGES = 8  # alarms of a run that are told in full
_SHOWN = ("loss", "eval_loss", "entropy_min", "max_logit", "lr", "grad_norm")


def run_data(runs: Sequence[RunSummary], looks: Mapping[str, Look], metric: str) -> str:
    """Everything that the page's script draws, as JSON.

    Args:
        runs: the runs, each under the name of its folder.
        looks: by arm.
        metric: the name of the metric; "" for none.
    """
    entries = ",".join(f"{json.dumps(str(run.folder))}:{_entry(run, looks, metric)}" for run in runs)
    return f'{{"panels":{json.dumps(_panels(metric))},"runs":{{{entries}}}}}'


def ending(run: RunSummary) -> str:
    """How a run ended, in words."""
    if run.status == "error":
        return f"raised at step {run.steps}: {run.error}" if run.steps else f"raised: {run.error}"
    if run.status == "unfinished":
        return f"no result yet, last logged step {run.steps}"
    worse = " with a loss no lower than at init" if run.failed and run.status != "diverged" else ""
    return f"{run.status} at step {run.steps}{worse}"


def _entry(run: RunSummary, looks: Mapping[str, Look], metric: str) -> str:
    curves = {name: run.curves[name] for name in (*_SHOWN, metric) if name in run.curves and len(run.curves[name][0])}
    listed = ",".join(f"{json.dumps(name)}:[{_digits(x)},{_digits(y)}]" for name, (x, y) in curves.items())
    alarms: list[list[Any]] = []
    for place, alarm in enumerate(run.alarms[:50]):
        told = [alarm.get("message", "")] if place < _MESSAGES else []
        alarms.append([alarm.get("step"), alarm.get("kind", ""), *told])
    facts = [["folder", str(run.folder)], *([["note", "; ".join(run.notes)]] if run.notes else [])]
    rest = {
        "name": f"{run.arm}{f', LR {run.lr:g}' if run.lr > 0 else ''}, seed {run.seed}",
        "end": f"This run {ending(run)}." if run.ended else f"This run has {ending(run)}.",
        "color": looks[run.arm].color,
        "steps": max((int(x[-1]) for x, _ in curves.values()), default=run.steps),
        "num_alarms": len(run.alarms),
        "alarms": alarms,
        "facts": facts,
    }
    return f'{json.dumps(rest, ensure_ascii=False)[:-1]},"curves":{{{listed}}}}}'


def _digits(values: Floats) -> str:
    """Numbers to four digits, steps whole, as JSON."""
    whole = bool(len(values)) and bool((values == np.round(values)).all()) and float(np.abs(values).max()) < 1e9
    return f"[{','.join(np.char.mod('%d' if whole else '%.4g', values))}]"


def _panels(metric: str) -> list[dict[str, Any]]:
    """What is drawn of a run: title, curves with their labels, and the empty chart."""
    grid = {"showgrid": True, "gridcolor": FAINT}
    panels: list[tuple[str, list[tuple[str, str]], dict[str, object]]] = [
        ("Loss of the batch; dotted: of the evaluation", [("loss", "batch"), ("eval_loss", "evaluation")], {}),
        ("Lowest attention entropy of any head, share of the maximum", [("entropy_min", "")], {"range": [-0.03, 1.03]}),
        ("Largest attention logit", [("max_logit", "")], {"type": "log"}),
        ("Gradient norm", [("grad_norm", "")], {"type": "log"}),
        ("Learning rate", [("lr", "")], {"rangemode": "tozero"}),
    ]
    if metric:
        panels.insert(1, (f"Evaluation: {metric}", [(metric, metric)], {}))
    x = axis("optimiser step", nticks=6)
    return [
        {"title": title, "curves": curves, "layout": _layout(chart(x, axis("", **grid, **scale), height=210))}
        for title, curves, scale in panels
    ]


def _layout(figure: Any) -> dict[str, Any]:
    return dict(json.loads(figure.to_json())["layout"])
