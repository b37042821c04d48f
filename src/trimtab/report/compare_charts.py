"""The pictures of a comparison."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.colors
import plotly.graph_objects as go

from trimtab.report.comparison import Comparison, of_arm
from trimtab.report.looks import Look
from trimtab.report.page import FAINT, PAPER, Panel, axis, chart, log_axis
from trimtab.report.runlog import Floats
from trimtab.report.summary import RunSummary

_RAMP = plotly.colors.sequential.Cividis  # ordered in lightness, the same to every eye
_BANDS = 4  # arms whose bands can lie over each other and still be read
_COLUMNS = 60  # steps of a heat map


@dataclass(frozen=True)
class Quantity:
    """What is drawn against the learning rate.

    Attributes:
        title: of the panel.
        unit: of the axis.
        of: the number of a run.
        scale: plotly's settings of the axis.
    """

    title: str
    unit: str
    of: Callable[[RunSummary], float]
    scale: dict[str, object]


def final_loss(comparison: Comparison) -> Quantity:
    """The final loss, never above that at init."""
    values = [comparison.loss(run) for run in comparison.runs if run.ended]
    title = "Final loss, or the loss at init where that is lower"
    return Quantity(title, "loss", comparison.loss, _scale(values))


def final_metric(comparison: Comparison) -> Quantity:
    """The final metric."""
    known = [value for run in comparison.runs if math.isfinite(value := comparison.metric_of(run))]
    share = bool(known) and min(known) >= 0 and max(known) <= 1
    scale: dict[str, object] = {"range": [0, 1.03]} if share and comparison.higher_is_better else _scale(known)
    return Quantity(f"Final {comparison.metric}", comparison.metric, comparison.metric_of, scale)


def lowest_entropy(comparison: Comparison) -> Quantity:
    """The lowest attention entropy of a run."""
    title = "Lowest attention entropy of any head"
    return Quantity(title, "share of the maximum", lambda run: run.entropy_min, {"range": [-0.03, 1.03]})


def largest_logit(comparison: Comparison) -> Quantity:
    """The largest attention logit of a run."""

    def of(run: RunSummary) -> float:
        return run.max_logit if run.max_logit > 0 else math.nan

    return Quantity("Largest attention logit of any head", "logit", of, log_axis([of(run) for run in comparison.runs]))


def against_lr(comparison: Comparison, quantity: Quantity, looks: Mapping[str, Look]) -> Panel:
    """All arms in one chart: a point for each run, the median of the seeds as a line, lowest to highest as a band."""
    figure = _lr_chart(comparison, quantity, 380)
    arms = list(looks)
    if len(arms) <= _BANDS:
        for arm in arms:
            _band(figure, comparison, quantity, arm, looks[arm])
    for place, arm in enumerate(arms):
        _line(figure, comparison, quantity, arm, looks[arm])
        nudge = 1 + 0.03 * (place - (len(arms) - 1) / 2) * min(1.0, 4 / len(arms))  # points of arms stay apart
        _points(figure, comparison, quantity, arm, looks[arm], nudge, size=8 if len(arms) <= _BANDS else 6)
    return Panel(quantity.title, figure)


def each_against_lr(comparison: Comparison, quantity: Quantity, looks: Mapping[str, Look]) -> list[Panel]:
    """One small chart for each arm, with its band, before the baseline's line; empty where one chart can show them."""
    arms = list(looks)
    if len(arms) <= _BANDS:
        return []
    panels = []
    for arm in arms:
        figure = _lr_chart(comparison, quantity, 210)
        _band(figure, comparison, quantity, arm, looks[arm])
        if arm != arms[0]:
            _line(figure, comparison, quantity, arms[0], looks[arms[0]])
        _line(figure, comparison, quantity, arm, looks[arm])
        _points(figure, comparison, quantity, arm, looks[arm], 1.0, size=7)
        panels.append(Panel(arm, figure))
    return panels


def entropy_over_steps(comparison: Comparison) -> list[Panel]:
    """The lowest entropy over the steps, the largest learning rate on top: one panel for each arm that was watched."""
    seen = [run for run in comparison.runs if len(run.curves.get("entropy_min", ([], []))[0])]
    if not seen:
        return []
    grid = np.linspace(1, max(float(run.curves["entropy_min"][0][-1]) for run in seen), _COLUMNS)
    rates = sorted({run.lr for run in seen if math.isfinite(run.lr)})  # plotly's rows begin below
    panels = []
    for arm in comparison.arms:
        rows = [_median_curve(of_arm(seen, arm, lr), grid) for lr in rates]
        if not any(np.isfinite(row).any() for row in rows):
            continue
        y = axis("learning rate", ticks="", type="category")
        x = axis("optimiser step", nticks=6, range=[0, float(grid[-1])])
        figure = chart(x, y, height=80 + 22 * len(rates))
        figure.add_heatmap(
            x=np.round(grid),
            y=[f"{lr:g}" for lr in rates],
            z=[[round(float(value), 3) if math.isfinite(value) else None for value in row] for row in rows],
            zmin=0,
            zmax=1,
            colorscale=_RAMP,
            showscale=False,
            ygap=1,
            hovertemplate="LR %{y}, step %{x}: %{z:.3f}<extra></extra>",
        )
        panels.append(Panel(arm, figure))
    return panels


def entropy_key() -> str:
    """The colour scale of the heat maps, as HTML."""
    ramp = f'<i class=ramp style="background:linear-gradient(to right,{",".join(_RAMP)})"></i>'
    return f"<div class=key><span>0: a head looks at one key {ramp} 1: at all keys alike</span></div>"


def arms_key(looks: Mapping[str, Look]) -> str:
    """The arms' colours and marks, as HTML; each is a button that hides and shows its arm."""
    entries = (
        f'<button type=button data-arm="{escape(arm)}"><b style="color:{look.color}">{look.sign}'
        f"{'' if look.dash == 'solid' else '┄'}</b>{escape(arm)}</button>"
        for arm, look in looks.items()
    )
    return f"<div class=key>{''.join(entries)}</div>"


def run_key(run: RunSummary) -> str:
    """What a run is called in the page's own data: its place."""
    return str(run.folder)


def _lr_chart(comparison: Comparison, quantity: Quantity, height: int) -> go.Figure:
    rates = sorted({run.lr for run in comparison.runs if run.lr > 0})
    ends = [math.log10(rates[0]) - 0.12, math.log10(rates[-1]) + 0.12] if rates else [0, 1]
    x = axis("learning rate", type="log", range=ends, tickvals=rates, ticktext=[f"{lr:g}" for lr in rates])
    figure = chart(x, axis(quantity.unit, showgrid=True, gridcolor=FAINT, **quantity.scale), height=height)
    figure.update_layout(hovermode="closest")
    return figure


def _spread(comparison: Comparison, quantity: Quantity, arm: str) -> list[tuple[float, Floats]]:
    """Learning rates and the values of the seeds there, ascending."""
    runs = [run for run in of_arm(comparison.runs, arm) if run.ended and run.lr > 0]
    values = {lr: np.array([quantity.of(run) for run in runs if run.lr == lr]) for lr in sorted({r.lr for r in runs})}
    known = {lr: each[np.isfinite(each)] for lr, each in values.items()}
    return [(lr, each) for lr, each in known.items() if len(each)]


def _band(figure: go.Figure, comparison: Comparison, quantity: Quantity, arm: str, look: Look) -> None:
    spread = _spread(comparison, quantity, arm)
    low = [(lr, float(values.min())) for lr, values in spread]
    high = [(lr, float(values.max())) for lr, values in reversed(spread)]
    if spread:
        x, y = zip(*low, *high, strict=True)
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            fill="toself",
            fillcolor=look.faded(0.16),
            line={"width": 0},
            hoverinfo="skip",
            legendgroup=arm,
        )


def _line(figure: go.Figure, comparison: Comparison, quantity: Quantity, arm: str, look: Look) -> None:
    spread = _spread(comparison, quantity, arm)
    figure.add_scatter(
        x=[lr for lr, _ in spread],
        y=[float(np.median(values)) for _, values in spread],
        mode="lines",
        line={"color": look.color, "width": 2.5, "dash": look.dash},
        hoverinfo="skip",
        legendgroup=arm,
    )


def _points(
    figure: go.Figure, comparison: Comparison, quantity: Quantity, arm: str, look: Look, nudge: float, size: int
) -> None:
    runs = [run for run in of_arm(comparison.runs, arm) if run.ended and run.lr > 0]
    runs = [run for run in runs if math.isfinite(quantity.of(run))]
    figure.add_scatter(
        x=[run.lr * nudge for run in runs],
        y=[quantity.of(run) for run in runs],
        mode="markers",
        marker={
            "color": look.color,
            "size": size,
            "opacity": 0.8,
            "symbol": ["x" if run.failed else look.symbol for run in runs],
            "line": {"color": PAPER, "width": 1},
        },
        customdata=[run_key(run) for run in runs],
        text=[f"{arm}, LR {run.lr:g}, seed {run.seed}{', failed' if run.failed else ''}" for run in runs],
        hovertemplate="%{y:.4g}<extra>%{text}</extra>",
        legendgroup=arm,
    )


def _median_curve(runs: Sequence[RunSummary], grid: Floats) -> Floats:
    """The median over the runs at the steps of a grid, each run as far as it went; NaN where none did."""
    rows = [np.interp(grid, *run.curves["entropy_min"], right=math.nan) for run in runs]
    filled = np.full(len(grid), math.nan)
    for column, values in enumerate(np.array(rows).T):
        known = values[np.isfinite(values)]
        if len(known):
            filled[column] = np.median(known)
    return filled


def _scale(values: Sequence[float]) -> dict[str, object]:
    """From zero where that shows all, logarithmic where values differ a lot."""
    known = [value for value in values if math.isfinite(value)]
    if not known or min(known) <= 0:
        return {}
    return {"range": [0, 1.06 * max(known)]} if max(known) < 20 * min(known) else log_axis(known)
