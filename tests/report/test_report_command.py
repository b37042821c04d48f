import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import NAN, write_compare, write_json, write_run

from trimtab.errors import RunFolderError
from trimtab.report.command import report_command
from trimtab.report.export import RUN_COLUMNS
from trimtab.train.folder import Found, open_folder

FINALS = {"none": {0.01: [0.4, 0.41], 0.1: [1.5, NAN]}, "sigma": {0.01: [0.5, 0.52], 0.1: [0.45, 0.5]}}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_many_runs_make_the_page_the_tables_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = write_compare(tmp_path / "c", FINALS)
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "parquet", "png")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert report_command([str(folder), *words]) == 0
    out = capsys.readouterr().out
    assert "best accuracy" in out
    assert f"page: {folder / 'report.html'}" in out
    assert (folder / "report.html").is_file()

    runs = rows(files["csv"])
    assert list(runs[0]) == list(RUN_COLUMNS)
    assert len(runs) == 8
    [diverged] = [run for run in runs if run["status"] == "diverged"]
    assert (diverged["arm"], diverged["lr"], diverged["seed"], diverged["failed"]) == ("none", "0.1", "1", "1")
    assert diverged["loss"] == ""  # not known
    [first] = [run for run in runs if (run["arm"], run["lr"], run["seed"]) == ("sigma", "0.01", "0")]
    assert (float(first["loss"]), float(first["metric"]), first["metric_name"]) == (0.5, 0.875, "accuracy")
    measures = {(each["arm"], each["measure"]): each for each in rows(tmp_path / "out-measures.csv")}
    assert float(measures["none", "share_failed"]["value"]) == 0.25
    assert float(measures["none", "best_loss"]["value"]) == pytest.approx(0.405)
    assert all(each["meaning"] for each in measures.values())
    differences = rows(tmp_path / "out-differences.csv")
    assert {(each["first"], each["second"], each["told"]) for each in differences} == {("none", "sigma", "0")}

    table = parquet.read_table(files["parquet"])
    assert table.column_names == list(RUN_COLUMNS)
    assert np.isnan(table["loss"].to_pylist()).sum() == 1
    assert table.schema.field("lr").metadata == {b"meaning": b"the recipe's learning rate"}


def test_the_picture_is_one_column_wide(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    folder = write_compare(tmp_path / "c", FINALS)
    assert report_command([str(folder), "--png", str(tmp_path / "x.png")]) == 0
    with image.open(tmp_path / "x.png") as picture:
        assert picture.width == 990  # 84 mm at 300 dots an inch
        colours = {colour[:3] for _, colour in picture.getcolors(maxcolors=100_000)}
    assert (0x00, 0x72, 0xB2) in colours  # sigma's, as on the page


def test_one_run_gets_a_page_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alarm = {"step": 20, "kind": "loss spike", "message": "The loss stood far above. Lower the learning rate."}
    folder = write_run(tmp_path / "run", "sigma", 0.03, alarms=[alarm], entropy=0.25)
    assert report_command([str(folder), "--out", str(tmp_path / "one.html")]) == 0
    out = capsys.readouterr().out
    assert "finished at step 20, accuracy 0.9000, loss 0.5, lowest entropy 0.250, largest logit 10, 1 alarm" in out
    text = (tmp_path / "one.html").read_text()
    assert "vit-digits: sigma, LR 0.03" in text
    assert "Attention entropy of every head" in text
    assert "blocks.0.attention head 1" in text
    assert "The loss stood far above. Lower the learning rate." in text
    assert "Alarms, and what to do" in text


def test_a_run_that_raised_before_its_first_step_gets_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write_compare(tmp_path / "c", FINALS) / "runs" / "sigma" / "lr0.01-seed7"
    place.mkdir()
    write_json(place / "error.json", {"kind": "RecipeError", "error": "no such layer"})
    assert report_command([str(place)]) == 0
    assert "raised: RecipeError: no such layer" in capsys.readouterr().out
    assert "no such layer" in (place / "report.html").read_text()


def test_a_run_under_way_or_of_ones_own_loop_gets_a_page_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "mine", result=False)
    write_json(folder / "run.json", {"format": 1, "torch": "9.9"})
    for path in folder.glob("heads*"):
        path.unlink()
    assert report_command([str(folder)]) == 0
    assert "no result yet, last logged step 20" in capsys.readouterr().out
    assert "Attention entropy of every head" not in (folder / "report.html").read_text()


def test_damaged_and_mixed_folders_report_what_is_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_compare(tmp_path / "runs" / "c", FINALS)
    for number in range(12):
        (write_run(tmp_path / "runs" / f"damaged-{number:02}") / "run.json").write_text("{")
    assert report_command([str(tmp_path / "nowhere"), str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert f"not readable: {tmp_path / 'nowhere'}: there is no such folder" in out
    assert "and 3 more that the page lists" in out
    assert (tmp_path / "runs" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name at least one folder"),
        (["{}/nothing"], "nothing to report: .*there is no such folder"),
        (["{}"], "nothing to report: .*there is no run in it"),
        (["{}/c", "--tolerance", "1.5"], "at least 0 and below 1, got 1.5"),
        (["{}/c", "--out", "{}/no/such/folder/x.html"], "cannot write .*x.html: No such file or directory"),
        (["{}/c", "--csv", "{}/no/such/folder/x.csv"], "cannot write .*x.csv: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, words: list[str], message: str) -> None:
    if any("/c" in word for word in words):
        write_compare(tmp_path / "c", FINALS)
    with pytest.raises(RunFolderError, match=message):
        report_command([word.format(tmp_path) for word in words])


def test_without_pyarrow_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_compare(tmp_path / "c", FINALS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RunFolderError, match="pip install pyarrow"):
        report_command([str(folder), "--parquet", str(tmp_path / "x.parquet")])


def test_a_page_in_the_folder_of_a_run_does_not_keep_the_run_from_going_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", result=False)
    assert report_command([str(folder)]) == 0
    assert (folder / "report.html").is_file()
    info = json.loads((folder / "run.json").read_text())
    with open_folder(folder, info) as found:
        assert found == Found()  # there is no checkpoint: it starts anew
