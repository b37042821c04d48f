"""The report as a picture: one HTML file that opens offline."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import plotly.colors
import plotly.graph_objects as go

from trimtab.inspect.names import is_cross, layer_of
from trimtab.inspect.report import Attention, Matrix, Report
from trimtab.inspect.table import closing_lines, headline, number, numbers_of, plain, span
from trimtab.report.page import FAINT, Figure, Panel, Table, axis, chart, page, write_html

_RAMP = plotly.colors.sequential.Cividis  # ordered in lightness, the same to every eye
# Colours of Okabe and Ito, told apart by the colour-blind; and marks, told apart by all.
_LOOKS = {
    "query": ("#0072B2", "circle"),
    "key": ("#56B4E9", "circle"),
    "value": ("#009E73", "circle"),
    "query factor": ("#0072B2", "triangle-up"),
    "key factor": ("#56B4E9", "triangle-up"),
    "value factor": ("#009E73", "triangle-up"),
    "fused": ("#0072B2", "diamond"),
    "output": ("#E69F00", "circle"),
    "mlp gate": ("#CC79A7", "square"),
    "mlp in": ("#D55E00", "square"),
    "mlp out": ("#8B4513", "square"),
    "other": ("#7F7F7F", "x"),
}
_SIGNS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "x": "✕"}
_MAX_STACKS = 4


def write_page(report: Report, path: str | Path) -> None:
    """Write the picture of a report.

    Args:
        report: of `inspect_checkpoint`.
        path: the HTML file, replacing an older one.

    Raises:
        OSError: it cannot be written.
    """
    write_html(path, report_page(report))


def report_page(report: Report) -> str:
    """The page as HTML; the same report gives the same text."""
    stacks = _stacks(report.matrices)
    figures = [
        _by_depth("Largest singular value by depth", "sigma", report, stacks, lambda m: [m.sigma]),
        _by_depth("Stable rank by depth", "stable rank", report, stacks, lambda m: [m.stable_rank]),
    ]
    if any(matrix.gamma for matrix in report.matrices):
        figures.insert(1, _by_depth("Gamma by depth: the spectral norm in use", "gamma", report, stacks, _gammas))
    if report.attention:
        figures.append(_energy_map(report))
    if report.embeddings:
        figures.append(_embeddings(report))
    header = ["weight", "shape", "sigma", "stable rank", "rms", "max |w|", "stored as"]
    rows = [[_label(m), *numbers_of(m), m.dtype] for m in report.matrices]
    if any(matrix.gamma for matrix in report.matrices):
        header += ["gamma", "sigma in use"]
        rows = [[*row, span(m.gamma), span(m.sigma_in_use)] for row, m in zip(rows, report.matrices, strict=True)]
    return page(
        title="Inside a checkpoint",
        intro=[headline(report), *_verdicts(report)],
        figures=figures,
        tables=[Table("Every weight", header, rows)],
        facts=_facts(report),
    )


def _verdicts(report: Report) -> list[str]:
    """What stands out, computed."""
    finite = [matrix for matrix in report.matrices if math.isfinite(matrix.sigma)]
    lines = []
    if finite:
        largest = max(finite, key=lambda matrix: matrix.sigma)
        lines.append(f"The largest sigma is {number(largest.sigma)}, of {_label(largest)}.")
        ranked = [m for m in finite if math.isfinite(m.stable_rank) and m.role not in ("position", "head")]
        if ranked:
            lowest = min(ranked, key=lambda matrix: matrix.stable_rank / min(_sides(matrix)))
            lines[0] += (
                f" The lowest stable rank for its size is {number(lowest.stable_rank)} of {min(_sides(lowest))}, "
                f"of {_label(lowest)}."
            )
    if report.broken:
        lines.append(
            f"{len(report.broken)} tensors hold NaN or inf, so they have no sigma: {', '.join(report.broken[:5])}"
        )
    return lines


def _by_depth(
    title: str, quantity: str, report: Report, stacks: dict[str, list[Matrix]], of: Callable[[Matrix], Sequence[float]]
) -> Figure:
    """One panel for each stack of layers, one line for each kind of weight; weights outside of stacks are left out."""
    panels, roles = [], []
    y = _scale([value for matrices in stacks.values() for m in matrices for value in of(m)])
    for stack, matrices in stacks.items():
        series: dict[str, list[tuple[str, int, float]]] = {}
        for position, matrix in enumerate(matrices):
            depth = layer_of(matrix.name).number if stack else position
            places = series.setdefault(_kind(matrix), [])
            places += [(_label(matrix), depth, value) for value in of(matrix) if math.isfinite(value) and value > 0]
        last = max((depth for points in series.values() for _, depth, _ in points), default=0)
        x = axis("layer" if stack else "weight, in the order of the table", dtick=_step(last))
        figure = chart(x, axis(quantity, showgrid=True, gridcolor=FAINT, **y))
        for role, points in series.items():
            roles += [role] if points else []
            labels, depths, values = zip(*points, strict=True) if points else ((), (), ())
            joined = role != "other" and len(set(depths)) == len(depths)  # several a layer, such as experts, are not
            figure.add_scatter(
                x=depths,
                y=values,
                mode="lines+markers" if joined else "markers",
                line={"color": _look(role)[0], "width": 2, "dash": "dot" if "cross" in role else "solid"},
                marker={"color": _look(role)[0], "size": 7, "symbol": _look(role)[1], "opacity": 0.85},
                text=labels,
                hovertemplate="%{y:.4g}<extra>%{text}</extra>",
            )
        panels.append(Panel(f"{stack}, {quantity}" if stack else f"all weights, {quantity}", figure))
    sentence = _SENTENCES[quantity]
    outside = len(report.matrices) - sum(map(len, stacks.values()))
    if outside:
        sentence += f" The table below also has what lies outside of these layers: {outside} more."
    return Figure(title, panels, sentence, _key(list(dict.fromkeys(roles))))


def _scale(values: Sequence[float]) -> dict[str, object]:
    """The axis of all panels: from zero where that shows all, logarithmic where values differ a lot."""
    known = [value for value in values if math.isfinite(value) and value > 0]
    if not known or max(known) < 20 * min(known):
        return {"range": [0, 1.08 * max(known, default=1.0)]}
    decades = range(math.floor(math.log10(min(known))), math.ceil(math.log10(max(known))) + 1)
    ticks = [m * 10.0**e for e in decades for m in ((1, 2, 5) if len(decades) < 5 else (1,))]
    ends = [math.log10(min(known)) - 0.1, math.log10(max(known)) + 0.1]
    return {"type": "log", "range": ends, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _step(last: int) -> int:
    """The distance of ticks at whole numbers from 0 to `last`."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, 10**9) if last <= 12 * step)


_SENTENCES = {
    "sigma": "A line that climbs with depth, or from one checkpoint of a run to the next, shows where weights grow.",
    "gamma": "Under sigma-Reparam the forward divides a weight by its sigma and multiplies it by gamma: gamma is the "
    "spectral norm that is in use, as far as the carried vectors are exact.",
    "stable rank": "Squared Frobenius norm over squared sigma: near 1, one direction carries the whole weight.",
}


def _energy_map(report: Report) -> Figure:
    groups: dict[str, list[Attention]] = {}
    for pair in report.attention:
        stack = layer_of(f"{pair.name}.weight").stack
        groups.setdefault(f"{stack}{', cross attention' if is_cross(pair.name) else ''}", []).append(pair)
    what = "largest singular value" if report.top == 1 else f"{report.top} largest singular values"
    ramp = f'<i class=ramp style="background:linear-gradient(to right,{",".join(_RAMP)})"></i>'
    whole = "" if report.num_heads else " The number of heads is not known: all heads are taken as one."
    return Figure(
        f"Share of the energy of W_q^T W_k in the {what}, for each head",
        [Panel(name or "all attention", _heat_map(pairs)) for name, pairs in groups.items()],
        "A head whose share is near 1 can tell keys apart in one direction only. Low attention entropy together with "
        f"a share near 1 is the collapse that ends training (arXiv 2505.21910); low entropy alone need not be.{whole}",
        f"<div class=key><span>0: spread over all directions {ramp} 1: all in one</span></div>",
    )


def _heat_map(pairs: Sequence[Attention]) -> go.Figure:
    """Layers from left to right, heads from top to bottom."""
    heads = max(len(pair.energy) for pair in pairs)
    layers = [layer_of(f"{pair.name}.weight").number for pair in pairs]
    columns = layers if len(set(layers)) == len(layers) else list(range(len(layers)))
    energies = [[*pair.energy, *[math.nan] * (heads - len(pair.energy))] for pair in pairs]
    x = axis("layer" if columns is layers else "attention module", ticks="", dtick=_step(max(columns)))
    y = axis("head", ticks="", autorange="reversed", dtick=_step(heads - 1))
    figure = chart(x, y, height=min(560, max(150, 90 + 22 * heads)))
    figure.add_heatmap(
        x=columns,
        z=[[value if math.isfinite(value) else None for value in row] for row in zip(*energies, strict=True)],
        zmin=0,
        zmax=1,
        colorscale=_RAMP,
        showscale=False,
        xgap=1,
        ygap=1,
        customdata=[[plain(pair.name) for pair in pairs]] * heads,
        hovertemplate="%{customdata}, head %{y}: %{z:.3f}<extra></extra>",
    )
    return figure


def _embeddings(report: Report) -> Figure:
    names = [plain(each.name) for each in report.embeddings]
    x = axis("standard deviation of the entries of a token's row", rangemode="tozero")
    figure = chart(x, axis("", ticks="", autorange="reversed"), height=90 + 40 * len(names))
    figure.add_scatter(
        x=[each.tev_mean for each in report.embeddings],
        y=names,
        mode="markers",
        marker={"color": "#0072B2", "size": 10},
        error_x={"type": "data", "array": [each.tev_std for each in report.embeddings], "color": "#0072B2"},
        hovertemplate="%{x:.4g}<extra>%{y}</extra>",
    )
    return Figure(
        "Token embedding variability",
        [Panel("Mean over the vocabulary, with the standard deviation as a bar", figure)],
        "A cheap stand-in for the variance of gradients in pre-LN language models; compare checkpoints of one run.",
    )


def _facts(report: Report) -> dict[str, str]:
    from trimtab import __version__

    facts = {"File": report.path, "Format": report.kind, "Trimtab": __version__}
    facts["Sigma"] = "largest singular value, exact to rounding; convolutions flattened to (out, everything else)"
    for index, line in enumerate(closing_lines(report), 1):
        facts[f"Note {index}"] = line
    return facts


def _stacks(matrices: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    """The stacks of two layers or more, largest first; all weights as one, under "", where there is no such stack."""
    found: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        layer = layer_of(matrix.name)
        if layer.stack:
            found.setdefault(layer.stack, []).append(matrix)
    deep = {stack: ms for stack, ms in found.items() if len({layer_of(m.name).number for m in ms}) > 1}
    largest = sorted(deep, key=lambda stack: -len(deep[stack]))[:_MAX_STACKS]
    return {stack: deep[stack] for stack in deep if stack in largest} or {"": list(matrices)}


def _key(roles: Sequence[str]) -> str:
    order = list(_LOOKS)
    spans = []
    for role in sorted(roles, key=lambda role: (order.index(_base(role)), role)):
        color, symbol = _look(role)
        sign = _SIGNS[symbol] + ("┄" if "cross" in role else "")
        spans.append(f'<span><b style="color:{color}">{sign}</b>{role}</span>')
    return f"<div class=key>{''.join(spans)}</div>"


def _look(role: str) -> tuple[str, str]:
    return _LOOKS[_base(role)]


def _base(role: str) -> str:
    return role.removesuffix(" (cross)")


def _kind(matrix: Matrix) -> str:
    role = matrix.role if matrix.role in _LOOKS else "other"
    return f"{role} (cross)" if matrix.cross and role != "other" else role


def _gammas(matrix: Matrix) -> Sequence[float]:
    return [abs(value) for value in matrix.gamma]


def _label(matrix: Matrix) -> str:
    return plain(matrix.name) + (f" [{matrix.part}]" if matrix.part else "")


def _sides(matrix: Matrix) -> tuple[int, int]:
    rows = matrix.shape[0]
    return rows, math.prod(matrix.shape[1:])
