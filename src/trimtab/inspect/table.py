"""The report as a table for a terminal of 100 columns, and as JSON."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from trimtab.inspect.names import Layer, attention_of, layer_of
from trimtab.inspect.report import Attention, Matrix, Report
from trimtab.watch.runlog import to_json
from trimtab.watch.taps.forward import WRAPPERS

Sort = Literal["layer", "sigma", "stable-rank", "name"]

WIDTH = 100
_NUMBERS = ("shape", "sigma", "stable rank", "rms", "max |w|")  # what numbers_of gives
_SHORTEST = 24  # columns for the name of a weight, if need be at the cost of others
_SKIPPED = 8  # how many skipped tensors are named one by one


def to_text(report: Report, sort: Sort = "layer", width: int = WIDTH) -> Group:
    """What `trimtab inspect` prints, for a rich console.

    Args:
        report: of `inspect_checkpoint`.
        sort: "layer" groups the weights layer by layer; "sigma" puts the largest first, "stable-rank" the smallest,
            "name" the alphabet.
        width: columns there are; names are cut to fit into them.
    """
    energies = {pair.name: pair for pair in report.attention}
    columns = ["weight", *_NUMBERS]
    columns += ["gamma"] if any(matrix.gamma for matrix in report.matrices) else []
    columns += ["q/k energy"] if energies else []
    rows = list(_rows(report, sort, energies))
    widths = {name: max(len(name), *(len(row.get(name, "")) for _, row in rows)) + 2 for name in columns}
    for spare in ("max |w|", "rms"):  # what a narrow terminal can best do without
        if sum(widths.values()) - widths["weight"] > width - _SHORTEST:
            columns.remove(spare)
            del widths[spare]
    room = max(width - sum(widths.values()) + widths["weight"], _SHORTEST // 2)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="left" if column == "weight" else "right")
    for style, row in rows:
        cells = [shorten(row["weight"], room), *(row.get(column, "") for column in columns[1:])]
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return Group(Text(headline(report)), Text(""), table, Text(""), *map(Text, closing_lines(report)))


def to_strict_json(report: Report) -> str:
    """The whole report as strict JSON: NaN and infinities are the strings "nan", "inf" and "-inf"."""
    return to_json(asdict(report))


def headline(report: Report) -> str:
    """What was opened: format, size, and the part that was taken for the model."""
    parts = [report.kind, f"{report.tensors:,} tensors", f"{report.parameters:,} numbers", _bytes(report.size)]
    if report.num_heads:
        shared = f" ({report.num_kv_heads} for keys and values)" if report.num_kv_heads != report.num_heads else ""
        parts.append(f"{report.num_heads} heads{shared}")
    line = f"{report.path}: {', '.join(parts)}"
    if report.key:
        line += f". The model is taken from {report.key!r}"
        line += f"; left out: {', '.join(report.left_out)}" if report.left_out else ""
    return line


def closing_lines(report: Report) -> list[str]:
    """What does not fit into a row per weight: embeddings, what is not finite, what was skipped, notes."""
    lines = [
        f"TEV of {plain(each.name)}: mean {number(each.tev_mean)}, standard deviation {number(each.tev_std)}"
        for each in report.embeddings
    ]
    if report.broken:
        named = ", ".join(report.broken[:_SKIPPED]) + (", ..." if len(report.broken) > _SKIPPED else "")
        lines.append(f"NOT FINITE: {len(report.broken)} tensors hold NaN or inf: {named}")
    large = [each for each in report.skipped if len(each.shape) > 1]
    lines += [f"skipped {each.name} {list(each.shape)}: {each.reason}" for each in large[:_SKIPPED]]
    rest = len(report.skipped) - len(large[:_SKIPPED])
    if rest:
        lines.append(f"skipped {rest} {'more' if large else 'counters, indices and the like'}; --json lists them all")
    if report.vectors:
        lines.append(f"{len(report.vectors)} tensors of one dimension or none (biases, gains) are not in the table.")
    if report.attention:
        what = "its largest singular value" if report.top == 1 else f"its {report.top} largest singular values"
        lines.append(f"q/k energy: share of W_q^T W_k's energy in {what}, lowest to highest head.")
        if not report.num_heads:
            lines.append("The number of heads is not known: all heads of a module are taken as one; see --num-heads.")
    return [*lines, *report.notes]


def number(value: float) -> str:
    """Four digits, or powers of ten for what is very small or large."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    if not value:
        return "0"
    return f"{value:#.4g}".removesuffix(".") if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def shorten(text: str, width: int) -> str:
    """Cut the middle out of a name that is too long: its ends tell the most."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


def _rows(report: Report, sort: Sort, energies: Mapping[str, Attention]) -> Iterator[tuple[str, dict[str, str]]]:
    """Style and cells of each row; layer by layer there is a heading for each layer."""
    before = ""
    for matrix in report.matrices if sort == "layer" else _sorted(report.matrices, sort):
        name = _unwrapped(matrix.name)
        layer = layer_of(name) if sort == "layer" else Layer("", -1, "", name)
        if layer.layer and layer.layer != before:
            yield "bold", {"weight": layer.layer}
        before = layer.layer
        rest = layer.rest.removesuffix(".weight") + (f" [{matrix.part}]" if matrix.part else "")
        cells = {"weight": "  " + rest if layer.layer else rest}
        cells |= dict(zip(_NUMBERS, numbers_of(matrix), strict=True))
        cells["gamma"] = span(matrix.gamma)
        if matrix.role == "query" and (module := attention_of(matrix.name)) in energies:
            cells["q/k energy"] = span(energies[module].energy)
        yield "bold red" if matrix.nonfinite else "", cells


def numbers_of(matrix: Matrix) -> list[str]:
    """Shape, sigma, stable rank, rms and largest magnitude as text."""
    shape = "×".join(map(str, matrix.shape))
    if matrix.nonfinite:
        return [shape, f"{matrix.nonfinite:,} bad", "–", "–", number(matrix.max_abs)]
    return [shape, *map(number, (matrix.sigma, matrix.stable_rank, matrix.rms, matrix.max_abs))]


def span(values: Sequence[float]) -> str:
    """One number, or the lowest and the highest of several."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "–" if values else ""
    low, high = f"{min(known):.3f}", f"{max(known):.3f}"
    return low if low == high else f"{low}–{high}"


def _sorted(matrices: Sequence[Matrix], sort: Sort) -> list[Matrix]:
    """Weights that are not finite, and so have no numbers, come first."""
    if sort == "name":
        return sorted(matrices, key=lambda matrix: matrix.label)
    if sort == "sigma":
        return sorted(matrices, key=lambda matrix: -math.inf if math.isnan(matrix.sigma) else -matrix.sigma)
    return sorted(matrices, key=lambda matrix: 0.0 if math.isnan(matrix.stable_rank) else matrix.stable_rank)


def plain(name: str) -> str:
    """A name without what says nothing: what wrappers put there, and the ending .weight."""
    return _unwrapped(name).removesuffix(".weight")


def _unwrapped(name: str) -> str:
    """Wrappers that compile or distribute have names of their own; that of DataParallel, in front, is "module"."""
    words = [word for word in name.split(".") if word not in WRAPPERS]
    return ".".join(words[1:] if words[:1] == ["module"] else words) or name


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
