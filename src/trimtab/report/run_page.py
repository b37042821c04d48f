"""The page of one run: its curves, its heads, its alarms and what to do about them."""

import math
from pathlib import Path

import numpy as np
import plotly.colors

from trimtab.errors import RunFolderError
from trimtab.report.collect import flat
from trimtab.report.compare_words import count, join, number
from trimtab.report.page import FAINT, Block, Figure, Panel, Prose, Table, axis, chart, log_axis, page, write_html
from trimtab.report.run_data import ending
from trimtab.report.runlog import Run, read_run
from trimtab.report.summary import RunSummary

_RAMP = plotly.colors.sequential.Cividis  # ordered in lightness, the same to every eye
_COLOR, _ALARM = "#0072B2", "#D55E00"
_COLUMNS = 300  # steps of a heat map
_WORST = 8  # heads in the table


def write_run_page(summary: RunSummary, out: str | Path) -> None:
    """Write the page of one run, also of one that is still going on or was made by a loop of one's own.

    Args:
        summary: the run, as `collect` reads it.
        out: the HTML file to write, replacing an older one.

    Raises:
        OSError: the page cannot be written.
    """
    write_html(out, run_page(summary, _run(summary.folder)))


def run_page(summary: RunSummary, run: Run | None) -> str:
    """The page as HTML.

    Args:
        summary: the run in short.
        run: all of it; None for one that raised before its first line.
    """
    curves = _curves(summary)
    blocks: list[Block] = [Figure("Over the steps", curves, _curves_sentence(summary))] if curves else []
    if run is not None and run.heads and np.isfinite(run.entropy_normalized).any():
        blocks.append(_heads(run))
        blocks.append(_worst(run))
    blocks.append(_alarms(summary))
    named = summary.info.get("recipe_name") or summary.folder.name
    return page(
        title=f"{named}: {summary.arm}{f', LR {summary.lr:g}' if summary.lr > 0 else ''}",
        intro=_headline(summary),
        figures=blocks,
        tables=[],
        facts=_facts(summary),
    )


def summary_line(run: RunSummary) -> str:
    """How a run ended and with what, in one line."""
    parts = [ending(run)]
    if math.isfinite(run.metric):
        parts.append(f"{run.metric_name} {run.metric:.4f}")
    if math.isfinite(run.loss):
        parts.append(f"loss {run.loss:.4g}")
    if math.isfinite(run.entropy_min):
        parts.append(f"lowest entropy {run.entropy_min:.3f}")
    if math.isfinite(run.max_logit):
        parts.append(f"largest logit {run.max_logit:,.4g}")
    return ", ".join([*parts, count(len(run.alarms), "alarm")])


def _run(folder: Path) -> Run | None:
    try:
        return read_run(folder)
    except RunFolderError:
        return None


def _headline(run: RunSummary) -> list[str]:
    line = summary_line(run)
    lines = [f"{line[:1].upper()}{line[1:]}."]
    if run.spikes:
        lines.append(f"The logged loss jumped up {count(run.spikes, 'time')}.")
    return [*lines, *(f"{note}." for note in run.notes)]


def _curves(run: RunSummary) -> list[Panel]:
    grid = {"showgrid": True, "gridcolor": FAINT}
    last = max((float(steps[-1]) for steps, _ in run.curves.values() if len(steps)), default=1.0)
    wanted: list[tuple[str, tuple[str, ...], dict[str, object]]] = [
        ("Loss of the batch; dotted: of the evaluation", ("loss", "eval_loss"), {}),
        (f"Evaluation: {run.metric_name}", (run.metric_name,), {}),
        ("Lowest attention entropy of any head, share of the maximum", ("entropy_min",), {"range": [-0.03, 1.03]}),
        ("Largest attention logit", ("max_logit",), _log(run, "max_logit")),
        ("Gradient norm", ("grad_norm",), _log(run, "grad_norm")),
        ("Learning rate", ("lr",), {"rangemode": "tozero"}),
    ]
    panels = []
    for title, names, scale in wanted:
        known = [name for name in names if name in run.curves and len(run.curves[name][0])]
        if not known:
            continue
        figure = chart(axis("optimiser step", range=[0, 1.02 * last], nticks=6), axis("", **grid, **scale), height=240)
        for place, name in enumerate(known):
            steps, values = run.curves[name]
            figure.add_scatter(
                x=steps,
                y=values,
                mode="lines" if len(steps) > 1 else "markers",
                line={"color": _COLOR, "width": 2, "dash": "dot" if place else "solid"},
                hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
            )
        for step in sorted({int(alarm["step"]) for alarm in run.alarms if isinstance(alarm.get("step"), int)})[:50]:
            figure.add_vline(x=step, line={"color": _ALARM, "width": 1, "dash": "dot"})
        panels.append(Panel(title, figure))
    return panels


def _log(run: RunSummary, name: str) -> dict[str, object]:
    return log_axis([float(value) for value in run.curves[name][1]] if name in run.curves else [])


def _curves_sentence(run: RunSummary) -> str:
    what = "A dotted upright line is an alarm; the list below says what each saw." if run.alarms else "No alarm rose."
    return f"{what} Long runs are drawn with fewer points, of each stretch the lowest and the highest."


def _heads(run: Run) -> Figure:
    """Entropy of every head over the steps; of several steps in one column the lowest."""
    lines = len(run.lines)
    starts = np.unique(np.linspace(0, lines, min(lines, _COLUMNS), endpoint=False).astype(int))
    lowest = np.fmin.reduceat(run.entropy_normalized, starts, axis=0)  # (columns, heads)
    labels = [name.replace(" head ", ", head ") for name in run.heads]
    modules = [name.rsplit(" head ", 1)[0] for name in run.heads]
    first = {module: modules.index(module) for module in reversed(modules)}
    middle = {module: start + (modules.count(module) - 1) / 2 for module, start in first.items()}
    ticks = {"tickvals": list(middle.values()), "ticktext": list(middle)} if len(middle) <= 32 else {}
    y = axis("", autorange="reversed", ticks="", **ticks)
    x = axis("optimiser step", nticks=8, range=[0, float(run.steps[-1])])
    figure = chart(x, y, height=min(900, max(220, 90 + 12 * len(labels))))
    figure.add_heatmap(
        x=run.steps[starts],
        z=[[round(float(v), 3) if math.isfinite(v) else None for v in row] for row in lowest.T],
        zmin=0,
        zmax=1,
        colorscale=_RAMP,
        showscale=False,
        customdata=[[label] * len(starts) for label in labels],
        hovertemplate="%{customdata}, step %{x}: %{z:.3f}<extra></extra>",
    )
    ramp = f'<i class=ramp style="background:linear-gradient(to right,{",".join(_RAMP)})"></i>'
    return Figure(
        "Attention entropy of every head",
        [Panel("Share of the maximum, log(number of keys)", figure)],
        "A row is a head. One that turns dark looks at a single key; whether that is bad, loss and logits tell.",
        f"<div class=key><span>0: looks at one key {ramp} 1: at all keys alike</span></div>",
    )


def _worst(run: Run) -> Table:
    """The heads with the lowest entropy at the end."""
    entropy, logits = run.entropy_normalized[-1], run.max_logit[-1]
    order = [int(place) for place in np.argsort(entropy, kind="stable") if math.isfinite(entropy[place])][:_WORST]
    rows = [
        [
            run.heads[place],
            f"{entropy[place]:.3f}",
            f"{np.fmin.reduce(run.entropy_normalized[:, place]):.3f}",
            number(float(logits[place]), ",.4g"),
        ]
        for place in order
    ]
    header = ["head", "entropy at the end", "lowest entropy", "largest logit at the end"]
    return Table(f"The {count(len(rows), 'head')} with the lowest entropy at the end", header, rows)


def _alarms(run: RunSummary) -> Block:
    messages = [str(alarm.get("message") or f"step {alarm.get('step')}: {alarm.get('kind')}") for alarm in run.alarms]
    if not messages:
        return Prose("Alarms", ["None."])
    more = [f"And {len(messages) - 30} more."] if len(messages) > 30 else []
    return Prose("Alarms, and what to do", [*messages[:30], *more])


def _facts(run: RunSummary) -> dict[str, str]:
    facts = {"folder": str(run.folder)}
    facts |= {
        name.replace("_", " "): str(value)
        for name, value in run.info.items()
        if not isinstance(value, dict | list) and name not in ("format",)
    }
    if math.isfinite(run.step_seconds):
        facts["median step"] = f"{run.step_seconds:.3g} s"
    if math.isfinite(run.peak_memory):
        facts["peak memory"] = f"{run.peak_memory / 1e6:,.0f} MB"
    recipe = run.info.get("recipe")
    if isinstance(recipe, dict):
        facts["recipe"] = join([f"{name} {value}" for name, value in flat(recipe).items() if value is not None])
    return facts
