"""`trimtab inspect`: its table, its JSON and its page."""

import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from trimtab.errors import CheckpointError
from trimtab.inspect import inspect_checkpoint
from trimtab.inspect.command import InspectOptions, inspect_command
from trimtab.inspect.page import report_page, write_page
from trimtab.inspect.table import number, plain, shorten, span, to_text
from trimtab.words import WordsError


def write(folder: Path, **changes: Tensor) -> Path:
    """A decoder of three layers with long names; layer 1 is the largest."""
    prefix = "_orig_mod.language_model.model.decoder_of_text.layers"
    state = {"_orig_mod.language_model.model.embed_tokens.weight": torch.randn(30, 8)}
    for layer, scale in enumerate((1.0, 100.0, 10.0)):
        for name, rows in (("self_attn.k_proj", 8), ("self_attn.q_proj", 8), ("mlp.down_proj", 8)):
            state[f"{prefix}.{layer}.{name}.weight"] = scale * torch.eye(rows)
            state[f"{prefix}.{layer}.{name}.bias"] = torch.zeros(rows)
    torch.save(state | changes, folder / "decoder.pt")
    return folder / "decoder.pt"


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert inspect_command([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_the_table_goes_layer_by_layer_within_100_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, write(tmp_path), "--num-heads", "2")
    headline, *lines = text.splitlines()
    assert headline == f"{tmp_path / 'decoder.pt'}: torch, 19 tensors, 888 numbers, 3.6 kB, 2 heads"
    assert max(map(len, lines)) <= 100
    weights = [line.split()[0] for line in lines if "×" in line]
    assert weights[1:4] == ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]
    assert weights[4:] == 2 * weights[1:4]
    query = next(line.split() for line in lines if line.startswith("  self_attn.q_proj"))
    assert query[1:] == ["8×8", "1.000", "8.000", "0.3536", "1.000", "0.250"]  # each head: 4 equal singular values
    assert any(line.startswith("TEV of ") for line in lines)
    assert "9 tensors of one dimension or none" in text


def test_a_narrow_terminal_has_fewer_columns(tmp_path: Path) -> None:
    report = inspect_checkpoint(write(tmp_path), num_heads=2)
    for width, there, gone in ((100, "max |w|", "–"), (75, "rms", "max |w|"), (60, "stable rank", "rms")):
        console = Console(width=width, file=io.StringIO())
        console.print(to_text(report, width=width))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        header = next(line for line in text.splitlines() if line.startswith("weight"))
        assert there in header
        assert gone not in header
        assert header.endswith("q/k energy")
        assert [line.split()[-1] for line in text.splitlines() if "q_proj" in line] == ["0.250"] * 3


@pytest.mark.parametrize("sort", ["sigma", "stable-rank", "name"])
def test_the_table_is_sorted(sort: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_checkpoint(write(tmp_path))
    lines = [line for line in run(capsys, tmp_path / "decoder.pt", "--sort", sort).splitlines() if "×" in line]
    assert len(lines) == len(report.matrices) == 10
    keys = {
        "sigma": lambda m: -m.sigma,
        "stable-rank": lambda m: m.stable_rank,
        "name": lambda m: m.name,
    }
    order = sorted(report.matrices, key=keys[sort])  # type: ignore[arg-type]
    # Names are shortened in the middle; their ends and their numbers tell them apart.
    assert [line.split()[2] for line in lines] == [number(matrix.sigma) for matrix in order]


def test_json_is_strict_and_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = torch.eye(3)
    broken[0, 0] = math.inf
    path = write(tmp_path, **{"head.weight": broken})

    def refuse(word: str) -> float:
        raise AssertionError(word)

    found = json.loads(run(capsys, path, "--json"), parse_constant=refuse)
    report = inspect_checkpoint(path)
    assert [matrix["name"] for matrix in found["matrices"]] == [matrix.name for matrix in report.matrices]
    head = next(matrix for matrix in found["matrices"] if matrix["name"] == "head.weight")
    assert (head["sigma"], head["nonfinite"], head["max_abs"]) == ("nan", 1, 1.0)
    assert found["attention"][1]["energy"] == pytest.approx([1 / 8])
    assert found["embeddings"][0]["tev_mean"] == report.embeddings[0].tev_mean


def test_what_is_not_finite_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, write(tmp_path, **{"head.weight": torch.full((2, 2), math.nan)}))
    assert "4 bad" in text
    assert "NOT FINITE: 1 tensors hold NaN or inf: head.weight" in text


class Links(HTMLParser):
    """Collects every attribute that would make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]


def test_the_page_has_every_picture_and_asks_for_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    out = run(capsys, write(tmp_path, **{"<script>.weight": torch.eye(2)}), "--html", page, "--num-heads", "2")
    assert f"page: {page}" in out
    text = page.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert links.fetched == []
    for title in ("Largest singular value by depth", "Stable rank by depth", "Token embedding variability"):
        assert f"<h2>{title}</h2>" in text
    assert "<h2>Share of the energy of W_q^T W_k in the largest singular value, for each head</h2>" in text
    assert "Gamma by depth" not in text
    assert "<td>&lt;script&gt;</td>" in text
    assert "The largest sigma is 100.0" in text
    assert report_page(inspect_checkpoint(tmp_path / "decoder.pt", num_heads=2)) == text


def test_the_page_of_weights_without_layers(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(2, 2), "b.weight": torch.full((2, 2), math.nan)}, tmp_path / "bare.pt")
    write_page(inspect_checkpoint(tmp_path / "bare.pt"), tmp_path / "bare.html")
    assert "all weights, sigma" in (tmp_path / "bare.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        inspect_command([str(write(tmp_path)), "--html", str(tmp_path / "no" / "folder.html")])


def test_numbers_and_names_are_short() -> None:
    assert [number(value) for value in (0.0, 1.0, 0.00012345, 123456.0, 0.30301, 1234.5, math.nan, math.inf)] == [
        "0",
        "1.000",
        "1.23e-04",
        "1.23e+05",
        "0.3030",
        "1234",
        "–",
        "inf",
    ]
    assert span((0.25, 0.5, math.nan)) == "0.250–0.500"
    assert (span(()), span((math.nan,)), span((0.1, 0.1))) == ("", "–", "0.100")
    assert shorten("abcdefghijkl", 10) == "abc…ghijkl"
    assert shorten("short", 10) == "short"


def test_bad_words_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WordsError, match="--sort must be one of layer, sigma, stable-rank, name; got 'colour'"):
        inspect_command([str(write(tmp_path)), "--sort", "colour"])


DOCUMENT = Path(__file__).parents[2] / "docs" / "inspect.md"


def test_the_document_names_the_options_there_are() -> None:
    named = set(re.findall(r"`--([a-z-]+)", DOCUMENT.read_text(encoding="utf-8")))
    options = {field.name.replace("_", "-") for field in dataclasses.fields(InspectOptions)}
    assert named - {"lr"} == options - {"file"}


def test_the_code_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    save_file({"a.weight": torch.eye(2)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/inspect.md", "exec"), {})


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("module.encoder.fc.weight", "encoder.fc"),  # DataParallel
        ("_orig_mod.module.fc.weight", "fc"),
        ("module._orig_mod.blocks.0._checkpoint_wrapped_module.fc.weight", "blocks.0.fc"),
        ("backbone.module.fc.weight", "backbone.module.fc"),  # the model's own
        ("weight", "weight"),
        ("module", "module"),
    ],
)
def test_only_what_wrappers_put_into_a_name_is_left_out(name: str, shown: str) -> None:
    assert plain(name) == shown


def test_layers_keep_modules_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"module.blocks.0.module.fc.weight": torch.eye(3)}, tmp_path / "wrapped.pt")
    lines = run(capsys, tmp_path / "wrapped.pt").splitlines()
    assert "blocks.0" in [line.strip() for line in lines]
    assert any(line.startswith("  module.fc ") for line in lines)
