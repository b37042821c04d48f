import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import RunFolderError
from trimtab.report.demo_page import demo_page, write_demo_page
from trimtab.report.demo_words import curves_sentence, entropy_sentence, sweep_sentence
from trimtab.report.page import Figure, Panel, Table, axis, chart, page
from trimtab.report.runlog import Run, read_run

MODEL = {"depth": 2, "num_heads": 2}
SIGMA = "sigma:gamma_init=one"


def write_run(
    folder: Path,
    stabilizer: str,
    lr: float,
    accuracy: float,
    *,
    seed: int = 0,
    entropy: float = 0.5,
    status: str = "finished",
) -> Path:
    """A doctored run of three logged steps, two layers and two heads."""
    folder = folder / f"{stabilizer}-{lr}-{seed}"
    folder.mkdir(parents=True)
    recipe = {"data": "digits", "model": MODEL, "stabilizer": stabilizer, "optimizer": "adamw", "lr": lr}
    recipe |= {"seed": seed, "steps": 20, "batch_size": 8}
    (folder / "run.json").write_text(json.dumps({"torch": "9.9", "machine": "<abacus>", "recipe": recipe}))
    last = "nan" if status == "diverged" else 0.5
    with (folder / "steps.jsonl").open("w") as log:
        for step, loss in ((1, 2.3), (10, 1.0), (20, last)):
            line = {"step": step, "loss": loss, "entropy_min": entropy, "max_logit": 9.0, "alarms": []}
            log.write(json.dumps(line | ({"accuracy": accuracy} if step > 1 else {})) + "\n")
    heads = [{"module": f"blocks.{block}.attention", "head": head} for block in (0, 1) for head in (0, 1)]
    (folder / "heads.json").write_text(json.dumps({"heads": heads}))
    for name in ("entropy", "entropy_normalized", "max_logit"):
        (folder / f"heads_{name}.f32").write_bytes(np.full((3, 4), entropy, "<f4").tobytes())
    result = {"status": status, "steps": 20, "loss": last, "metrics": {"accuracy": accuracy}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def pair(folder: Path, baseline: dict[float, list[float]], steadied: dict[float, list[float]]) -> list[Run]:
    """Runs with these accuracies: learning rate to one accuracy per seed."""
    return [
        read_run(write_run(folder, stabilizer, lr, accuracy, seed=seed))
        for stabilizer, arm in (("none", baseline), (SIGMA, steadied))
        for lr, accuracies in arm.items()
        for seed, accuracy in enumerate(accuracies)
    ]


def test_the_sentence_on_curves_says_who_is_ahead(tmp_path: Path) -> None:
    wins = curves_sentence(pair(tmp_path / "wins", {0.1: [0.5, 0.7]}, {0.1: [0.9, 0.95]}), 0.1)
    assert "with seeds 0 and 1: pre-LN 0.500 and 0.700; σ-Reparam without LayerNorm 0.900 and 0.950." in wins
    assert wins.endswith("Every run of σ-Reparam without LayerNorm ends above every run of pre-LN.")
    loses = curves_sentence(pair(tmp_path / "loses", {0.1: [0.9, 0.95]}, {0.1: [0.5, 0.7]}), 0.1)
    assert loses.endswith("Every run of pre-LN ends above every run of σ-Reparam without LayerNorm.")
    overlaps = curves_sentence(pair(tmp_path / "overlaps", {0.1: [0.2, 0.8]}, {0.1: [0.7, 0.9]}), 0.1)
    assert overlaps.endswith("σ-Reparam without LayerNorm has the higher median, but the runs overlap.")
    level = curves_sentence(pair(tmp_path / "level", {0.1: [0.8, 0.9]}, {0.1: [0.9, 0.8]}), 0.1)
    assert level.endswith("The two are level.")


def test_the_sentence_on_curves_counts_what_diverged(tmp_path: Path) -> None:
    runs = pair(tmp_path, {}, {0.1: [0.9]})
    runs += [read_run(write_run(tmp_path, "none", 0.1, 0.0, seed=seed, status="diverged")) for seed in (0, 1)]
    assert curves_sentence(runs, 0.1).endswith(" Stopped because the loss was no longer finite: 2 of pre-LN.")


def test_the_sentence_on_entropy_counts_collapsed_heads(tmp_path: Path) -> None:
    def sentence(name: str, baseline: float, steadied: float) -> str:
        folders = [
            write_run(tmp_path / name, "none", 0.1, 0.5, entropy=baseline),
            write_run(tmp_path / name, SIGMA, 0.1, 0.9, entropy=steadied),
        ]
        return entropy_sentence([read_run(folder) for folder in folders], 0.1)

    wins = sentence("wins", 0.01, 0.5)
    assert "4 of 4 heads of pre-LN and 0 of 4 heads of σ-Reparam without LayerNorm are below 0.03" in wins
    assert wins.endswith("It is pre-LN that collapses more.")
    assert sentence("loses", 0.5, 0.01).endswith("It is σ-Reparam without LayerNorm that collapses more.")
    assert sentence("neither", 0.5, 0.6).endswith("Neither collapses.")
    assert sentence("both", 0.01, 0.02).endswith("The two collapse alike.")
    assert "was not seen" in sentence("unseen", float("nan"), 0.5)


def test_the_sentence_on_the_sweep_says_where_it_wins_and_where_it_loses(tmp_path: Path) -> None:
    baseline = {0.001: [0.98], 0.01: [0.9], 0.1: [0.2, 0.6, 0.7]}
    mixed = sweep_sentence(pair(tmp_path / "mixed", baseline, {0.001: [0.9], 0.01: [0.903], 0.1: [0.95, 0.9, 0.97]}))
    assert "wins at 0.1, loses at 0.001 and is level at 0.01" in mixed
    assert "−0.080 at 0.001, +0.003 at 0.01 and +0.350 at 0.1" in mixed
    assert "0.980 for pre-LN (at 0.001) and 0.950 for σ-Reparam without LayerNorm (at 0.1)" in mixed
    assert mixed.endswith("tuned, pre-LN is ahead.")
    never = sweep_sentence(pair(tmp_path / "never", baseline, {lr: [0.1] for lr in baseline}))
    assert "loses at 0.001, 0.01 and 0.1" in never
    assert "wins" not in never
    always = sweep_sentence(pair(tmp_path / "always", baseline, {lr: [0.995] for lr in baseline}))
    assert "wins at 0.001, 0.01 and 0.1" in always
    assert always.endswith("tuned, σ-Reparam without LayerNorm is ahead.")


def test_only_learning_rates_of_both_arms_are_compared(tmp_path: Path) -> None:
    runs = pair(tmp_path, {0.01: [0.9], 0.1: [0.5]}, {0.1: [0.9], 1.0: [0.1]})
    sentence = sweep_sentence(runs)
    assert "at 0.1" in sentence
    assert "0.01" not in sentence
    assert "Learning rate 0.1: loss and accuracy" in demo_page(runs)


class Links(HTMLParser):
    """Collects every attribute that would make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag == "meta" and ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""


def test_the_page_is_one_file_with_three_pictures_that_asks_for_nothing(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, stabilizer, lr, 0.5, status=status)
        for stabilizer, status in (("none", "diverged"), (SIGMA, "finished"))
        for lr in (0.01, 0.1)
    ]
    path = tmp_path / "demo.html"
    write_demo_page(folders, path)
    text = path.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert links.fetched == []
    assert "default-src 'none'" in links.policy
    assert "http" not in links.policy
    assert text.count("Plotly.newPlot(name") == 1
    assert len(re.findall(r'<figure id="figure-\d">', text)) == 3
    assert len(re.findall("<figcaption>.{20,}?</figcaption>", text)) == 3
    for cell in ("diverged at 20", "finished at 20", "0.5000", "9.9", "&lt;abacus&gt;"):
        assert cell in text, cell
    assert "<abacus>" not in text
    write_demo_page(folders, path)
    assert path.read_text(encoding="utf-8") == text


def drawn(text: str, name: str) -> dict[str, object]:
    """A chart of the page, as plotly gets it."""
    found = re.search(rf'^"{name}": (\{{.*\}}),?$', text, re.MULTILINE)
    assert found, name
    return json.loads(found[1].replace("<\\/", "</"))


def test_the_charts_show_the_runs(tmp_path: Path) -> None:
    runs = pair(tmp_path, {0.01: [0.9], 0.1: [0.2, 0.6, 0.7]}, {0.01: [0.8], 0.1: [0.9, 0.95, 0.85]})
    text = demo_page(runs)
    accuracy = drawn(text, "figure-1-2")
    assert [trace["name"] for trace in accuracy["data"]] == [
        f"{arm}, seed {seed}" for arm in ("pre-LN", "σ-Reparam") for seed in (0, 1, 2)
    ]
    labels = {note["text"]: note["y"] for note in accuracy["layout"]["annotations"]}
    assert labels == {"<b>pre-LN</b>": 0.6, "<b>σ-Reparam</b>": 0.9}  # the medians, where the lines end
    heat = [drawn(text, f"figure-2-{panel}") for panel in (1, 2)]
    assert [(chart["data"][0]["zmin"], chart["data"][0]["zmax"]) for chart in heat] == [(0, 1), (0, 1)]
    assert heat[0]["data"][0]["colorscale"] == heat[1]["data"][0]["colorscale"]
    assert heat[0]["layout"]["yaxis"]["ticktext"] == ["layer 1", "layer 2"]
    assert heat[0]["layout"]["yaxis"]["tickvals"] == [0.5, 2.5]
    sweep = drawn(text, "figure-3-1")
    assert sweep["layout"]["xaxis"]["type"] == "log"
    assert sweep["data"][0]["y"] == [0.9, 0.6]  # the baseline's medians
    assert sweep["data"][1]["y"] == [0.9, 0.2, 0.6, 0.7]  # all its seeds
    for chart_ in (accuracy, *heat, sweep):
        assert chart_["layout"]["xaxis"]["title"]["text"]


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "none", 0.1, 0.5), write_run(tmp_path, SIGMA, 0.2, 0.5)]
    with pytest.raises(RunFolderError, match="no learning rate in common"):
        write_demo_page(folders, tmp_path / "demo.html")
    with pytest.raises(RunFolderError, match="no run folder"):
        write_demo_page([tmp_path / "nowhere"], tmp_path / "demo.html")
    assert not (tmp_path / "demo.html").exists()


def test_text_of_any_kind_cannot_break_the_page() -> None:
    figure = chart(axis("x"), axis("y"))
    figure.add_scatter(x=[0], y=[1], name="</script><b>")
    text = page(
        "a < b",
        ["1 & 2"],
        [Figure("<i>", [Panel("<u>", figure)], "</figure>")],
        [Table("T", ["<th>"], [["<td>"]])],
        {"<dt>": "{braces}"},
    )
    assert "a &lt; b" in text
    assert "</script><b>" not in text
    assert "&lt;/figure&gt;" in text
    assert "{braces}" in text
