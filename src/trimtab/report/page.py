"""One self-contained HTML page: plotly.js is inside it, and it asks the network for nothing."""

import contextlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import plotly.offline

from trimtab.report.page_template import DARK, DOCUMENT, FONT, INK, STYLE
from trimtab.report.page_template import FAINT as FAINT  # the charts of the other pages use these three, too
from trimtab.report.page_template import PAPER as PAPER
from trimtab.report.page_template import SOFT as SOFT


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
        f"figure-{number}-{index}": _inside_script(panel.chart.to_json())
        for number, figure in enumerate([*figures, *tables], 1)
        if isinstance(figure, Figure)
        for index, panel in enumerate(figure.panels, 1)
    }
    return DOCUMENT.format(
        title=_text(title),
        style=STYLE,
        plotly=plotly.offline.get_plotlyjs(),
        body="\n".join(body),
        charts=",\n".join(f'"{name}": {chart}' for name, chart in charts.items()),
        dark=json.dumps(DARK),
        data=_inside_script(data),
        script=script,
    )


def write_html(path: str | Path, text: str) -> None:
    """Write a page aside, then rename it: on a full disk an older page stays whole."""
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None  # the name that was asked for


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
    """Settings of a logarithmic axis whose ticks are written out: 1, 2, 5, or powers of ten where there are many.

    Where the values lie so close that hardly one of these is among them, those of a linear one.
    """
    known = [value for value in values if 0 < value < math.inf]
    if not known:
        return {"type": "log"}
    if max(known) < 2.5 * min(known):
        return {"type": "linear"}
    decades = range(math.floor(math.log10(min(known))), math.ceil(math.log10(max(known))) + 1)
    few = math.log10(max(known) / min(known)) < 2.5
    ticks = [m * 10.0**e for e in decades for m in ((1, 2, 5) if few else (1,))]
    ends = [math.log10(min(known)) - 0.1, math.log10(max(known)) + 0.1]
    return {"type": "log", "range": ends, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def chart(x: dict[str, object], y: dict[str, object], height: int = 300, right: int = 12) -> go.Figure:
    """An empty chart in the page's look; `x` and `y` come from `axis`, `height` and `right` are pixels."""
    layout = go.Layout(  # at once: updating one is many times slower
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
    return go.Figure(layout=layout)


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
    hints = [f' title="{_text(hint)}"' if hint else "" for hint in table.hints] or [""] * len(table.header)
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


def _inside_script(text: str) -> str:
    """JSON that may stand in a script: "</script>" would end it, "<!--" hide its end."""
    return text.replace("<", "\\u003c")


def _text(text: str) -> str:
    return html.escape(text)
