import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from run_folders import NAN, recipe_of, write_compare, write_json, write_run

from trimtab.errors import RunFolderError
from trimtab.report.collect import collect
from trimtab.report.compare_page import write_compare_page
from trimtab.report.compare_words import headline, told
from trimtab.report.comparison import comparisons
from trimtab.report.looks import looks
from trimtab.report.measured import measure_all
from trimtab.report.page import log_axis

NOISE = 0.01 * np.random.default_rng(0).random((2, 3, 5))
CLEAR = {
    "none": {
        lr: list(level + NOISE[0, place]) for place, (lr, level) in enumerate(((0.01, 0.4), (0.1, 0.9), (1, 1.7)))
    },
    "sigma": {lr: list(0.5 + NOISE[1, place]) for place, lr in enumerate((0.01, 0.1, 1))},
}


class Reader(HTMLParser):
    """The page's tables as a browser shows them, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.rows: list[list[str]] = []
        self.bold: set[str] = set()
        self._in: str | None = None
        self._class = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.fetched += [str(given[name]) for name in ("src", "href", "action") if name in given]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in, self._class = tag, str(given.get("class"))

    def handle_endtag(self, tag: str) -> None:
        self._in = None if tag == self._in else self._in

    def handle_data(self, data: str) -> None:
        if self._in:
            self.rows[-1][-1] += data
            if self._class == "bold":
                self.bold.add(data)


def read(path: Path) -> tuple[str, Reader]:
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    return text, reader


def data_of(text: str) -> dict[str, dict[str, object]]:
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return dict(json.loads(found))


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "c", CLEAR)
    written = write_compare_page([folder], tmp_path / "page.html")
    text, reader = read(tmp_path / "page.html")
    assert reader.fetched == []
    assert "default-src 'none'" in text
    assert text.count('<div id="figure-') >= 6
    assert "30 runs of vit-digits: 2 arms, 3 learning rates, 5 seeds." in text
    assert written.path == tmp_path / "page.html"
    write_compare_page([folder], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_bold_are_the_winners_that_the_seeds_can_name_and_no_others(tmp_path: Path) -> None:
    write_compare_page([write_compare(tmp_path / "c", CLEAR)], tmp_path / "page.html")
    _, reader = read(tmp_path / "page.html")
    header, none, sigma = reader.rows[:3]
    bold = {title for title, cell in zip(header, none, strict=True) if cell in reader.bold}
    assert {"best loss", "best accuracy"} <= bold  # 0.4 against 0.5
    bold = {title for title, cell in zip(header, sigma, strict=True) if cell in reader.bold}
    assert "LR sensitivity" in bold
    assert "best loss" not in bold
    two = {arm: {lr: finals[:2] for lr, finals in by_lr.items()} for arm, by_lr in CLEAR.items()}
    written = write_compare_page([write_compare(tmp_path / "two", two)], tmp_path / "two.html")
    text, reader = read(tmp_path / "two.html")
    assert reader.bold == set()
    assert "With 2 seeds no difference can be told from chance" in text
    assert "2 seeds cannot name a winner" in written.summary


def test_the_summary_for_a_terminal(tmp_path: Path) -> None:
    summary = write_compare_page([write_compare(tmp_path / "c", CLEAR)], tmp_path / "page.html").summary
    header, none, sigma, note = summary.splitlines()
    assert header.split("  ")[-1].strip() == "step time"
    assert none.startswith("none ")
    assert "at 0.01*" in none
    assert sigma.startswith("sigma ")
    assert note == "(3 learning rates, 5 seeds; * the seeds tell it from every other arm)"


def test_the_words_say_who_is_ahead_and_what_cannot_be_told(tmp_path: Path) -> None:
    [clear] = comparisons(collect([write_compare(tmp_path / "clear", CLEAR)]))
    measured = measure_all(clear)
    lines = " ".join(headline(clear, measured))
    assert "Best accuracy, each at its own best learning rate: none is first with 0.899" in lines
    assert "at 0.01; the seeds tell it from sigma" in lines
    assert "LR sensitivity, over all learning rates: sigma is first with 0.0" in lines
    assert "No run failed." in lines
    assert "A step takes 1.00 × with sigma, over one with none." in lines
    by_name = {each.measure.name: each for each in measured}
    assert told(by_name["lr_sensitivity"]) == "LR sensitivity: the seeds can tell sigma below none."
    same = dict.fromkeys(("none", "sigma", "clip"), CLEAR["sigma"])
    failing = {**same, "warmup": {0.01: [NAN] * 5, 0.1: [0.4] * 5, 1: [NAN] * 5}}
    [level] = comparisons(collect([write_compare(tmp_path / "level", failing)]))
    measured = measure_all(level)
    lines = " ".join(headline(level, measured))
    assert "cannot tell it from" in lines
    assert "Runs that failed: 10 of 15 with warmup." in lines
    by_name = {each.measure.name: each for each in measured}
    assert "They cannot tell the other 3 pairs." in told(by_name["share_failed"])


def test_each_run_keeps_its_curves_with_their_spikes(tmp_path: Path) -> None:
    losses: list[float | str] = [2.0] * 3000
    losses[1234] = 77.0
    losses[-1] = NAN
    alarm = {"step": 12350, "kind": "loss spike", "message": "<!--<script></script><b>low & behold</b>"}
    folder = write_run(tmp_path / "c" / "long", "sigma", losses=losses, alarms=[alarm])
    write_run(tmp_path / "c" / "short")
    write_compare_page([tmp_path / "c"], tmp_path / "page.html")
    text, _ = read(tmp_path / "page.html")
    run = data_of(text)["runs"][str(folder)]
    steps, values = run["curves"]["loss"]  # type: ignore[index]
    assert values[steps.index(12350)] == 77
    assert len(steps) <= 202
    assert run["alarms"] == [[12350, "loss spike", alarm["message"]]]  # type: ignore[index]
    assert text.count("</script><b>") == text.count("<!--<script>") == 0


def test_names_from_outside_are_text_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "c" / "a", "<b>bold</b>", info={"machine": "<i>abacus</i>", "recipe_name": "</script>"})
    write_run(tmp_path / "c" / "b")
    write_compare_page([tmp_path / "c"], tmp_path / "page.html")
    text, reader = read(tmp_path / "page.html")
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "<b>bold" not in outside
    assert "<i>abacus" not in outside
    assert any("<b>bold</b>" in row for row in reader.rows)


def test_failures_and_what_is_not_readable_are_listed(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "c", {"none": {0.1: [NAN, 1.0]}, "sigma": {0.1: [0.5, 2.5]}})
    broken = write_run(folder / "runs" / "sigma" / "lr0.1-seed2", "sigma", 0.1, 2, result=False)
    write_json(broken / "error.json", {"kind": "OSError", "error": "disk full"})
    (write_run(tmp_path / "c" / "damaged") / "run.json").write_text("{")
    write_compare_page([folder, tmp_path / "missing"], tmp_path / "page.html")
    text, reader = read(tmp_path / "page.html")
    cells = {cell for row in reader.rows for cell in row}
    assert "diverged at step 20" in cells
    assert "finished at step 20 with a loss no lower than at init" in cells
    assert "raised at step 20: OSError: disk full" in cells
    assert "there is no such folder" in cells
    assert any("run.json is damaged" in cell for cell in cells)
    assert "2 folders could not be read; the last table lists them." in text


def test_runs_of_different_data_are_drawn_apart_with_a_warning(tmp_path: Path) -> None:
    write_compare(tmp_path / "c", {"none": {0.1: [1.0]}, "sigma": {0.1: [1.0]}})
    write_run(tmp_path / "other", recipe={"data": "fashion"})
    write_compare_page([tmp_path], tmp_path / "page.html")
    text, _ = read(tmp_path / "page.html")
    assert "told apart into 2 comparisons" in text
    assert "Comparison 2 of 2" in text


def test_only_unfinished_runs_are_shown_without_measures(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "c" / str(seed), seed=seed, result=False)
    written = write_compare_page([tmp_path / "c"], tmp_path / "page.html")
    assert "Nothing can be measured" in read(tmp_path / "page.html")[0]
    first, second, *_ = written.summary.splitlines()
    assert first == "2 runs; nothing can be measured."
    assert second == "2 of 2 runs have no result yet; they are shown, not measured."


def raises(folder: Path, arm: str, seeds: int) -> None:
    """Runs at 0.1 that raised before they wrote anything but error.json."""
    for seed in range(seeds):
        place = folder / "runs" / arm / f"lr0.1-seed{seed}"
        place.mkdir(parents=True)
        write_json(place / "error.json", {"kind": "ValueError", "error": "no such thing", "arm": arm})
    compare = json.loads((folder / "compare.json").read_text())
    compare["arms"][arm] = recipe_of(arm, 0.1, 0, steps=20)
    write_json(folder / "compare.json", compare)


def test_an_arm_whose_runs_all_raised_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "c", {"none": {0.1: [1.0, 1.0, 1.0]}})
    raises(folder, "sigma", 3)
    written = write_compare_page([folder], tmp_path / "page.html")
    text, _ = read(tmp_path / "page.html")
    assert "Runs that failed: 3 of 3 with sigma." in text
    assert "sigma is not measured: its runs raised before they had a loss." in text
    assert written.summary.splitlines()[-1] == "sigma is not measured: its runs raised before they had a loss."


def test_a_compare_whose_runs_all_raised_says_why_and_draws_no_empty_picture(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    write_compare(tmp_path / "c", {})
    raises(tmp_path / "c", "none", 2)
    raises(tmp_path / "c", "sigma", 2)
    written = write_compare_page([tmp_path / "c"], tmp_path / "page.html")
    text, reader = read(tmp_path / "page.html")
    assert written.summary.startswith("4 runs; nothing can be measured.\n")
    assert "Runs that failed: 2 of 2 with none and 2 of 2 with sigma." in text
    assert sum("raised: ValueError: no such thing" in cell for row in reader.rows for cell in row) == 4
    assert '<div id="figure-' not in text


def test_a_compare_whose_runs_all_diverged_names_no_best_learning_rate(tmp_path: Path) -> None:
    nothing = {0.1: [NAN] * 3, 0.2: [NAN] * 3}
    written = write_compare_page([write_compare(tmp_path / "c", {"none": nothing, "sigma": nothing})], tmp_path / "p")
    text, reader = read(tmp_path / "p")
    assert "Runs that failed: 6 of 6 with none and 6 of 6 with sigma." in text
    assert not any(" at 0.1" in cell for row in reader.rows[:3] for cell in row)
    assert " at 0.1" not in written.summary
    assert "Best accuracy, each" not in text


def test_one_learning_rate_has_no_sensitivity_to_it(tmp_path: Path) -> None:
    losses = {"none": {0.1: [1.0, 1.1, 1.2]}, "sigma": {0.1: [0.5, 0.61, 0.7]}}
    written = write_compare_page([write_compare(tmp_path / "c", losses)], tmp_path / "page.html")
    text, reader = read(tmp_path / "page.html")
    assert not any(cell.startswith("LR ") and cell != "LR" for row in reader.rows for cell in row)
    assert "Best accuracy: sigma is first with 0.849; the seeds tell it from none 0.725." in text
    assert "LR sensitivity" not in written.summary


def test_one_seed_is_told_as_one(tmp_path: Path) -> None:
    write_compare(tmp_path / "c", {"none": {0.1: [1.0], 0.2: [1.0]}, "sigma": {0.1: [0.5], 0.2: [0.6]}})
    write_compare_page([tmp_path / "c"], tmp_path / "page.html")
    text, reader = read(tmp_path / "page.html")
    assert reader.bold == set()
    assert "95 % interval" not in text
    assert "With 1 seed no difference can be told from chance" in text


def test_close_values_on_a_logarithmic_axis_have_ticks() -> None:
    assert log_axis([3.6, 3.9]) == {"type": "linear"}  # 2 and 5 lie outside
    assert log_axis([1.0, 30.0])["ticktext"] == ["1", "2", "5", "10", "20", "50", "100", "200", "500"]


def test_unwatched_runs_have_no_picture_of_their_attention(tmp_path: Path) -> None:
    write_compare(tmp_path / "c", {"none": {0.1: [1.0]}, "sigma": {0.1: [1.0]}}, entropy=NAN, logit=NAN)
    write_compare_page([tmp_path / "c"], tmp_path / "page.html")
    text, reader = read(tmp_path / "page.html")
    assert "Against the learning rate" in text
    assert "Inside the attention" not in text
    assert "lowest entropy" not in reader.rows[0]


def test_a_single_run_compares_with_nothing(tmp_path: Path) -> None:
    written = write_compare_page([write_run(tmp_path / "run")], tmp_path / "page.html")
    assert read(tmp_path / "page.html")[1].bold == set()
    assert "0.900" in written.summary
    assert "there is one arm" in written.summary


def test_the_page_has_colours_for_the_night(tmp_path: Path) -> None:
    write_compare_page([write_run(tmp_path / "run")], tmp_path / "page.html")
    text, _ = read(tmp_path / "page.html")
    night = json.loads(re.findall(r"night.matches \? Object.entries\((.*?)\)", text)[0])
    for day, dark in night.items():  # every colour of the charts' frames, and of the style
        assert day in text.split("<style>")[1].split("</style>")[0]
        assert dark in text.split("prefers-color-scheme: dark")[1]


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"nothing to report: .*there is no run in it"):
        write_compare_page([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_arms_are_told_apart_by_colour_and_mark() -> None:
    found = looks([f"arm {index}" for index in range(19)])
    assert len({(look.color, look.symbol, look.dash) for look in found.values()}) == 19
    assert found["arm 1"].faded(0.5) == "rgba(0,114,178,0.5)"


@pytest.mark.slow
def test_a_browser_draws_the_page_and_opens_a_run(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    folder = write_compare(tmp_path / "c", CLEAR)
    write_compare_page([folder], tmp_path / "page.html")
    key = str(folder / "runs" / "none" / "lr0.1-seed2").replace("/", "%2F")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=8000"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [*words, f"{(tmp_path / 'page.html').as_uri()}#{key}"], capture_output=True, text=True, timeout=120
    )
    assert "none, LR 0.1, seed 2" in done.stdout
    assert "<dialog open" in done.stdout
    assert done.stdout.count('class="main-svg"') >= 2 * (6 + 5)  # of the page's charts and of the run's
    assert "Uncaught" not in done.stderr
