"""One self-contained HTML page: plotly.js is inside it, and it asks the network for nothing."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import plotly.offline

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, SOFT, FAINT, PAPER = "#1f2328", "#636c76", "#e4e7eb", "#ffffff"
_DARK = {INK: "#e6edf3", SOFT: "#9aa4af", FAINT: "#30363d", PAPER: "#0d1117"}  # for who prefers dark pages


@dataclass(frozen=True)
class Panel:
    """One chart of a figure.

    Attributes:
        title: what it shows, units included; plain text.
        chart: the plotly figure.
    """

    title: str
    chart: go.Figure


@dataclass(frozen=True)
class Figure:
    """One picture of the page: panels beside each other (below each other on a phone) and a sentence.

    Attributes:
        title: a short heading, plain text.
        panels: the charts.
        sentence: what is to be seen, plain text.
        key: HTML above the panels that explains colours; may be empty.
    """

    title: str
    panels: Sequence[Panel]
    sentence: str
    key: str = ""


@dataclass(frozen=True)
class Table:
    """Exact numbers.

    Attributes:
        title: a heading, plain text.
        header: column names.
        rows: cells as text, one sequence per row.
        sentence: what is to be seen below the table, plain text; may be empty.
        bold: (row, column) of the cells that stand out.
        soft: (row, column) of the cells that stand back.
        keys: what a row stands for, for the page's script; empty, or one per row.
        folded: whether it is closed at first.
        hints: what a column means, shown on pointing at its head; empty, or one per column.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    sentence: str = ""
    bold: frozenset[tuple[int, int]] = frozenset()
    soft: frozenset[tuple[int, int]] = frozenset()
    keys: Sequence[str] = ()
    folded: bool = False
    hints: Sequence[str] = ()


@dataclass(frozen=True)
class Prose:
    """Paragraphs under a heading.

    Attributes:
        title: the heading, plain text.
        paragraphs: plain text.
    """

    title: str
    paragraphs: Sequence[str]


Block = Figure | Table | Prose


def page(
    title: str,
    intro: Sequence[str],
    figures: Sequence[Block],
    tables: Sequence[Block],
    facts: Mapping[str, str],
    script: str = "",
    data: str = "",
) -> str:
    """Assemble the page.

    Args:
        title: the heading, plain text.
        intro: paragraphs below it, plain text.
        figures: the pictures, and what stands between them, in reading order.
        tables: the tables that follow them.
        facts: what is needed to repeat the numbers (machine, versions, seeds), name to text.
        script: JavaScript that runs before the charts are drawn; each of them then sends a "drawn" event.
        data: JSON for it, as the text of the element "data".

    Returns:
        The whole HTML document. The same input gives the same text.
    """
    body = [f"<h1>{_text(title)}</h1>", *(f"<p class=intro>{_text(paragraph)}</p>" for paragraph in intro)]
    body += [_block(block, f"figure-{number}") for number, block in enumerate([*figures, *tables], 1)]
    entries = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    body.append(f"<h2>How these numbers were made</h2><dl>{entries}</dl>")
    charts = {
        f"figure-{number}-{index}": panel.chart.to_json().replace("</", "<\\/")  # "</script>" would end the script
        for number, figure in enumerate([*figures, *tables], 1)
        if isinstance(figure, Figure)
        for index, panel in enumerate(figure.panels, 1)
    }
    return _DOCUMENT.format(
        title=_text(title),
        style=_STYLE,
        plotly=plotly.offline.get_plotlyjs(),
        body="\n".join(body),
        charts=",\n".join(f'"{name}": {chart}' for name, chart in charts.items()),
        dark=json.dumps(_DARK),
        data=data.replace("</", "<\\/"),
        script=script,
    )


def axis(title: str, **settings: object) -> dict[str, object]:
    """A quiet axis: thin, outside ticks, no zero line; `settings` are plotly's and win."""
    quiet: dict[str, object] = {
        "title": {"text": title, "font": {"size": 13, "color": SOFT}, "standoff": 8},
        "showgrid": False,
        "zeroline": False,
        "linecolor": SOFT,
        "tickcolor": SOFT,
        "tickfont": {"size": 12, "color": SOFT},
        "ticks": "outside",
        "ticklen": 4,
        "automargin": True,
        "fixedrange": True,
    }
    return quiet | settings


def log_axis(values: Sequence[float]) -> dict[str, object]:
    """Settings of a logarithmic axis whose ticks are written out: 1, 2, 5, or powers of ten where there are many."""
    known = [value for value in values if 0 < value < math.inf]
    if not known:
        return {"type": "log"}
    decades = range(math.floor(math.log10(min(known))) - 1, math.ceil(math.log10(max(known))) + 2)
    ticks = [m * 10.0**e for e in decades for m in ((1, 2, 5) if len(decades) < 6 else (1,))]
    ends = [math.log10(min(known)) - 0.1, math.log10(max(known)) + 0.1]
    return {"type": "log", "range": ends, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def chart(x: dict[str, object], y: dict[str, object], height: int = 300, right: int = 12) -> go.Figure:
    """An empty chart in the page's look; `x` and `y` come from `axis`, `height` and `right` are pixels."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": right, "t": 8, "b": 8},
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        hoverlabel={"bgcolor": PAPER, "bordercolor": FAINT, "font": {"family": FONT, "color": INK}},
        xaxis=x,
        yaxis=y,
    )
    return figure


def _figure(figure: Figure, name: str) -> str:
    panels = []
    for number, panel in enumerate(figure.panels, 1):
        place = f'<div id="{name}-{number}" style="height:{panel.chart.layout.height}px"></div>'
        panels.append(f"<div class=panel><h3>{_text(panel.title)}</h3>{place}</div>")
    return (
        f'<figure id="{name}"><h2>{_text(figure.title)}</h2>{figure.key}'
        f"<div class=panels>{''.join(panels)}</div><figcaption>{_text(figure.sentence)}</figcaption></figure>"
    )


def _block(block: Block, name: str) -> str:
    if isinstance(block, Figure):
        return _figure(block, name)
    if isinstance(block, Table):
        return _table(block)
    return f"<h2>{_text(block.title)}</h2>" + "".join(f"<p>{_text(line)}</p>" for line in block.paragraphs)


def _table(table: Table) -> str:
    hints = [f' title="{_text(hint)}"' for hint in table.hints] or [""] * len(table.header)
    header = "".join(f"<th{hint}>{_text(cell)}</th>" for cell, hint in zip(table.header, hints, strict=True))
    rows = []
    for number, row in enumerate(table.rows):
        key = f' data-key="{_text(table.keys[number])}" tabindex=0' if table.keys else ""
        cells = (f"<td{_mark(table, number, column)}>{_text(cell)}</td>" for column, cell in enumerate(row))
        rows.append(f"<tr{key}>{''.join(cells)}</tr>")
    sentence = f"<p class=below>{_text(table.sentence)}</p>" if table.sentence else ""
    inside = (
        f"<div class=scroll><table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{sentence}"
    )
    title = f"<h2>{_text(table.title)}</h2>"
    return f"<details><summary>{title}</summary>{inside}</details>" if table.folded else title + inside


def _mark(table: Table, row: int, column: int) -> str:
    return " class=bold" if (row, column) in table.bold else " class=soft" if (row, column) in table.soft else ""


def _text(text: str) -> str:
    return html.escape(text)


# The policy lets the page's own scripts run and forbids every request to the network. The charts are drawn last,
# when the page's layout is known: drawn where they stand, the first panel of a row takes the width of the row.
_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body><main>
{body}
</main>
<script type="application/json" id="data">{data}</script>
<script>
const night = matchMedia("(prefers-color-scheme: dark)");
const inks = night.matches ? Object.entries({dark}) : [];
const inked = chart => !inks.length ? chart
  : JSON.parse(inks.reduce((text, [light, dark]) => text.replaceAll(light, dark), JSON.stringify(chart)));
function draw(name, chart) {{
  const {{data, layout}} = inked(chart);
  return Plotly.newPlot(name, data, layout, {{displayModeBar: false, responsive: true}});
}}
night.addEventListener("change", () => location.reload());
const waiting = Object.entries({{
{charts}
}});
function drawNext() {{
  const [name, chart] = waiting.shift();
  const told = new CustomEvent("drawn", {{detail: document.getElementById(name)}});
  draw(name, chart).then(() => document.dispatchEvent(told));
}}
function drawRest() {{  // one after another, so that the page can be read and scrolled meanwhile
  if (waiting.length) {{ drawNext(); setTimeout(drawRest); }}
}}
addEventListener("beforeprint", () => {{ while (waiting.length) drawNext(); }});
setTimeout(drawRest);
{script}
</script>
</body>
</html>
"""

_STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK}; --soft: {SOFT}; --faint: {FAINT}; --paper: {PAPER}; }}
@media (prefers-color-scheme: dark) {{ :root {{
  --ink: {_DARK[INK]}; --soft: {_DARK[SOFT]}; --faint: {_DARK[FAINT]}; --paper: {_DARK[PAPER]}; }} }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 {FONT}; }}
main {{ max-width: 1040px; margin: 0 auto; padding: 40px 20px 64px; }}
h1 {{ font-size: 32px; line-height: 1.2; margin: 0 0 16px; letter-spacing: -0.01em; }}
h2 {{ font-size: 21px; line-height: 1.3; margin: 0 0 8px; }}
h3 {{ font-size: 14px; font-weight: 600; color: var(--soft); margin: 12px 0 4px; }}
p {{ margin: 0 0 14px; max-width: 46em; }}
figure {{ margin: 44px 0 0; }}
figcaption {{ margin-top: 10px; max-width: 46em; padding-left: 14px; border-left: 3px solid var(--faint); }}
main > h2 {{ margin-top: 48px; }}
.panels {{ display: grid; gap: 8px 32px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }}
.panel {{ min-width: 0; }}
.key {{ font-size: 14px; color: var(--soft); display: flex; flex-wrap: wrap; align-items: center; gap: 4px 20px; }}
.key span {{ display: inline-flex; align-items: center; gap: 7px; }}
.key button {{ display: inline-flex; align-items: center; gap: 7px; border: 0; padding: 2px 0; font: inherit;
  background: none; color: var(--ink); cursor: pointer; }}
.key button.off {{ opacity: 0.35; text-decoration: line-through; }}
dialog {{ width: min(1000px, 94vw); max-height: 92vh; overflow-y: auto;
  border: 1px solid var(--faint); border-radius: 8px; padding: 20px 24px; box-sizing: border-box;
  background: var(--paper); color: var(--ink); font-size: 15px; }}
dialog::backdrop {{ background: rgba(0, 0, 0, 0.45); }}
dialog .close {{ float: right; font: inherit; }}
dialog p.fact {{ margin: 4px 0; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }}
.ramp {{ width: 150px; height: 11px; border-radius: 2px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; white-space: pre;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--faint); }}
th:first-child, td:first-child {{ text-align: left; }}
td {{ vertical-align: top; }}
td:first-child {{ white-space: pre-wrap; max-width: 22em; overflow-wrap: anywhere; }}
th {{ vertical-align: bottom; white-space: pre-wrap; min-width: 3.2em; }}
th {{ color: var(--soft); font-weight: 600; border-bottom-color: var(--soft); }}
td.bold {{ font-weight: 700; }}
td.soft {{ color: var(--soft); }}
th[title] {{ text-decoration: underline dotted; text-underline-offset: 3px; cursor: help; }}
tr[data-key] {{ cursor: pointer; }}
tr[data-key]:hover, tr[data-key]:focus {{ background: var(--faint); }}
.scroll {{ max-height: 36em; overflow-y: auto; }}
.scroll thead th {{ position: sticky; top: 0; background: var(--paper); }}
.below {{ font-size: 15px; margin-top: 10px; }}
details {{ margin-top: 32px; }}
summary h2 {{ display: inline; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; font-size: 14px; margin: 0; }}
dt {{ color: var(--soft); }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
@media (max-width: 520px) {{
  main {{ padding: 24px 16px 48px; }}
  h1 {{ font-size: 26px; }}
  dl {{ grid-template-columns: 1fr; }}
  dd {{ margin-bottom: 8px; }}
}}
"""
