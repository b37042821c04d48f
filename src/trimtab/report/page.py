"""One self-contained HTML page: plotly.js is inside it, and it asks the network for nothing."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import plotly.offline

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, SOFT, FAINT = "#1f2328", "#636c76", "#e4e7eb"


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
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def page(
    title: str,
    intro: Sequence[str],
    figures: Sequence[Figure],
    tables: Sequence[Table],
    facts: Mapping[str, str],
) -> str:
    """Assemble the page.

    Args:
        title: the heading, plain text.
        intro: paragraphs below it, plain text.
        figures: the pictures, in reading order.
        tables: the tables that follow them.
        facts: what is needed to repeat the numbers (machine, versions, seeds), name to text.

    Returns:
        The whole HTML document. The same input gives the same text.
    """
    body = [f"<h1>{_text(title)}</h1>", *(f"<p class=intro>{_text(paragraph)}</p>" for paragraph in intro)]
    body += [_figure(figure, f"figure-{number}") for number, figure in enumerate(figures, 1)]
    body += [_table(table) for table in tables]
    entries = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    body.append(f"<h2>How these numbers were made</h2><dl>{entries}</dl>")
    charts = {
        f"figure-{number}-{index}": panel.chart.to_json().replace("</", "<\\/")  # "</script>" would end the script
        for number, figure in enumerate(figures, 1)
        for index, panel in enumerate(figure.panels, 1)
    }
    return _DOCUMENT.format(
        title=_text(title),
        style=_STYLE,
        plotly=plotly.offline.get_plotlyjs(),
        body="\n".join(body),
        charts=",\n".join(f'"{name}": {chart}' for name, chart in charts.items()),
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
        hoverlabel={"bgcolor": "white", "bordercolor": FAINT, "font": {"family": FONT, "color": INK}},
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


def _table(table: Table) -> str:
    header = "".join(f"<th>{_text(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return (
        f"<h2>{_text(table.title)}</h2><div class=scroll><table><thead><tr>{header}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


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
<script>
for (const [name, chart] of Object.entries({{
{charts}
}})) Plotly.newPlot(name, chart.data, chart.layout, {{displayModeBar: false, responsive: true}});
</script>
</body>
</html>
"""

_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #fff; color: {INK}; font: 17px/1.55 {FONT}; }}
main {{ max-width: 1040px; margin: 0 auto; padding: 40px 20px 64px; }}
h1 {{ font-size: 32px; line-height: 1.2; margin: 0 0 16px; letter-spacing: -0.01em; }}
h2 {{ font-size: 21px; line-height: 1.3; margin: 0 0 8px; }}
h3 {{ font-size: 14px; font-weight: 600; color: {SOFT}; margin: 12px 0 4px; }}
p {{ margin: 0 0 14px; max-width: 46em; }}
figure {{ margin: 44px 0 0; }}
figcaption {{ margin-top: 10px; max-width: 46em; padding-left: 14px; border-left: 3px solid {FAINT}; }}
main > h2 {{ margin-top: 48px; }}
.panels {{ display: grid; gap: 8px 32px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }}
.panel {{ min-width: 0; }}
.key {{ font-size: 14px; color: {SOFT}; display: flex; flex-wrap: wrap; align-items: center; gap: 4px 20px; }}
.key span {{ display: inline-flex; align-items: center; gap: 7px; }}
.ramp {{ width: 150px; height: 11px; border-radius: 2px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 5px 14px 5px 0; border-bottom: 1px solid {FAINT}; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ color: {SOFT}; font-weight: 600; border-bottom-color: {SOFT}; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; font-size: 14px; margin: 0; }}
dt {{ color: {SOFT}; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
@media (max-width: 520px) {{
  main {{ padding: 24px 16px 48px; }}
  h1 {{ font-size: 26px; }}
  dl {{ grid-template-columns: 1fr; }}
  dd {{ margin-bottom: 8px; }}
}}
"""
