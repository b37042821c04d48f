"""The demo's charts. Colours are safe for the colour-blind, every axis says what it measures and in what unit."""

from collections.abc import Sequence
from statistics import median

import numpy as np
import plotly.colors
import plotly.graph_objects as go

from trimtab.report.demo_arms import ARMS, BASELINE, Arm, accuracy, learning_rates, of_arm, seed
from trimtab.report.page import FAINT, Panel, axis, chart
from trimtab.report.runlog import Floats, Run

_RAMP = plotly.colors.sequential.Cividis  # ordered in lightness, the same to every eye
_LABEL = 96  # pixels at the right for the longest name at a line's end
_SMALLEST_LOSS = 1e-4  # a logarithmic axis has no zero


def curves(runs: Sequence[Run], lr: float) -> list[Panel]:
    """Loss and test accuracy over the steps at one learning rate, one line per run."""
    last = max(float(run.steps[-1]) for run in runs)
    steps = {"range": [0, last * 1.02], "nticks": 6}
    grid = {"showgrid": True, "gridcolor": FAINT}
    x = axis("optimiser step", **steps)
    charts = {
        "loss": chart(x, axis("nats", type="log", dtick=1, **grid), right=_LABEL),
        "accuracy": chart(x, axis("share of the test set", range=[0, 1.02], **grid), right=_LABEL),
    }
    for column, figure in charts.items():
        ends: dict[Arm, float] = {}
        for arm in ARMS:
            lines = [_line(run, column) for run in of_arm(runs, arm, lr)]
            for run, (taken, values) in zip(of_arm(runs, arm, lr), lines, strict=True):
                figure.add_scatter(
                    x=taken,
                    y=values,
                    mode="lines",
                    line={"color": arm.color, "width": 2},
                    opacity=0.8,
                    name=f"{arm.short}, seed {seed(run)}",
                    hovertemplate="step %{x}: %{y:.3f}<extra>%{fullData.name}</extra>",
                )
            finite = [float(values[-1]) for _, values in lines if len(values)]
            if finite:
                ends[arm] = median(finite)
        _label_ends(figure, ends, logarithmic=column == "loss")
    return [
        Panel("Training loss: cross-entropy of one batch", charts["loss"]),
        Panel("Test accuracy", charts["accuracy"]),
    ]


def heat_maps(runs: Sequence[Run], lr: float) -> list[Panel]:
    """Entropy of every head over the steps, one panel per arm, its first seed; both on the scale from 0 to 1."""
    panels = []
    for arm in ARMS:
        run = of_arm(runs, arm, lr)[0]
        names = [name.rsplit(" head ", 1) for name in run.heads]  # [module, head]
        layers = list(dict.fromkeys(module for module, _ in names))
        rows = [f"layer {layers.index(module) + 1}, head {int(head) + 1}" for module, head in names]
        first = {module: [module for module, _ in names].index(module) for module in layers}
        middle = [start + sum(module == other for other, _ in names) / 2 - 0.5 for module, start in first.items()]
        ticks = {"tickvals": middle, "ticktext": [f"layer {i}" for i in range(1, len(layers) + 1)]}
        y = axis("", autorange="reversed", ticks="", **ticks)
        figure = chart(axis("optimiser step", nticks=6), y, height=340)
        figure.add_heatmap(
            x=run.steps,
            z=run.entropy_normalized.T,  # (heads, lines)
            zmin=0,
            zmax=1,
            colorscale=_RAMP,
            showscale=False,
            customdata=np.tile(np.array(rows, dtype=object)[:, None], (1, len(run.lines))),
            hovertemplate="%{customdata}, step %{x}: %{z:.3f}<extra></extra>",
        )
        for start in list(first.values())[1:]:
            figure.add_hline(y=start - 0.5, line={"color": "white", "width": 2})
        panels.append(Panel(f"{arm.name}, seed {seed(run)}", figure))
    return panels


def sweep(runs: Sequence[Run]) -> Panel:
    """Final accuracy against the learning rate: every run as a point, the median of an arm as a line."""
    rates = learning_rates(runs)
    x = axis("learning rate (logarithmic)", type="log", tickvals=rates, ticktext=[f"{lr:g}" for lr in rates])
    y = axis("share of the test set", range=[0, 1.02], gridcolor=FAINT, showgrid=True)
    figure = chart(x, y, height=360, right=_LABEL)
    ends: dict[Arm, float] = {}
    for arm in ARMS:
        nudge = 0.985 if arm is BASELINE else 1.015  # points of both arms stay apart at one learning rate
        shown = [run for lr in rates for run in of_arm(runs, arm, lr)]
        middle = [median(map(accuracy, of_arm(runs, arm, lr))) for lr in rates]
        ends[arm] = middle[-1]
        placed = np.array(rates) * nudge
        line = {"color": arm.color, "width": 2}
        figure.add_scatter(x=placed, y=middle, mode="lines", line=line, hoverinfo="skip")
        figure.add_scatter(
            x=[float(run.info["recipe"]["lr"]) * nudge for run in shown],
            y=[accuracy(run) for run in shown],
            mode="markers",
            marker={"color": arm.color, "size": 10, "opacity": 0.75, "line": {"color": "white", "width": 1}},
            text=[f"{arm.short}, seed {seed(run)}" for run in shown],
            hovertemplate="%{y:.3f}<extra>%{text}</extra>",
        )
    _label_ends(figure, ends, logarithmic=False)
    return Panel("Test accuracy at the end: every run a point, the median a line", figure)


def entropy_key() -> str:
    """The colour scale of the heat maps, as HTML."""
    ramp = f'<i class=ramp style="background:linear-gradient(to right,{",".join(_RAMP)})"></i>'
    return f"<div class=key><span>0: all attention on one patch {ramp} 1: the same on all patches</span></div>"


def _line(run: Run, column: str) -> tuple[Floats, Floats]:
    """Steps and values where the value is finite."""
    values = run.column(column)
    known = np.isfinite(values)
    values = values[known]
    return run.steps[known], np.maximum(values, _SMALLEST_LOSS) if column == "loss" else values


def _label_ends(figure: go.Figure, ends: dict[Arm, float], *, logarithmic: bool) -> None:
    """Write the arms' names where their lines end, pushed apart when they end close together."""
    heights = {arm: float(np.log10(end)) if logarithmic else end for arm, end in ends.items()}
    spread = max(heights.values(), default=0.0) - min(heights.values(), default=0.0)
    push = 9 if len(heights) == 2 and spread < (0.15 if logarithmic else 0.08) else 0
    for rank, (arm, height) in enumerate(sorted(heights.items(), key=lambda item: item[1])):
        figure.add_annotation(
            x=1,
            xref="paper",
            xanchor="left",
            xshift=6,
            y=height,
            yshift=push if rank else -push,
            text=f"<b>{arm.short}</b>",
            font={"color": arm.color, "size": 13},
            showarrow=False,
        )
