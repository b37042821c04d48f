import gzip
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab.errors import DataError, RecipeError
from trimtab.tasks.data import DATA_SETS, DataFile, DataSet, command, data_folder, read_data
from trimtab.tasks.data.command import data_command

real = pytest.mark.skipif(not os.environ.get("TRIMTAB_DATA"), reason="TRIMTAB_DATA is not set")


def sum_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trimtab" / "data"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A data folder with two small sets: one of two files, one packed."""
    files = (
        DataFile("toy/a.txt", 1, sum_of(b"a"), "http://127.0.0.1:1/a"),
        DataFile("toy/b.txt", 1, sum_of(b"b"), "http://127.0.0.1:1/b"),
    )
    packed = (DataFile("tiny/c.txt.gz", 2, sum_of(b"cc"), packed=True),)
    monkeypatch.setitem(DATA_SETS, "toy", DataSet("toy", "images", "2 letters", "MIT", "us", files))
    monkeypatch.setitem(DATA_SETS, "tiny", DataSet("tiny", "speech", "1 letter", "none stated", "nobody", packed))
    folder = tmp_path / "data"
    monkeypatch.setenv("TRIMTAB_DATA", str(folder))
    for path, content in (("toy/a.txt", b"a"), ("toy/b.txt", b"b"), ("tiny/c.txt.gz", gzip.compress(b"cc"))):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def line(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


def test_list_tells_what_is_here(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "toy" / "b.txt").unlink()
    assert data_command(["list"]) == 0
    text = capsys.readouterr().out
    assert "in the package" in line(text, "digits")
    assert "MIT" in line(text, "toy ")
    assert "1 of 2 files here" in line(text, "toy ")
    assert "here" in line(text, "tiny ")
    assert "absent; can be fetched" in line(text, "fashion-mnist")
    assert "absent" in line(text, "cifar10-jpeg")
    assert "fetched" not in line(text, "cifar10-jpeg")
    assert text.endswith(f"data folder: {folder}\n")


def test_list_tells_of_a_folder_that_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIMTAB_DATA", str(folder / "misspelt"))
    assert data_command(["list"]) == 0
    assert capsys.readouterr().out.endswith("misspelt, which is not there yet\n")


def test_check_names_every_file_that_is_damaged_or_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_command(["check"]) == 0
    text = capsys.readouterr().out
    assert "toy/a.txt: good" in text
    assert "tiny/c.txt.gz: good" in text
    assert "absent: fashion-mnist, cifar10" in text

    (folder / "toy" / "a.txt").write_bytes(b"x")
    (folder / "toy" / "b.txt").unlink()
    (folder / "tiny" / "c.txt.gz").write_bytes(b"no gzip")
    assert data_command(["check"]) == 1
    shown = capsys.readouterr()
    assert f"is damaged: expected 1 bytes of sha256 {sum_of(b'a')[:12]}" in line(shown.out, "toy/a.txt")
    assert "missing in" in line(shown.out, "toy/b.txt")
    assert "its gzip cannot be unpacked" in line(shown.out, "tiny/c.txt.gz")
    assert "3 files are damaged or missing" in shown.err


def test_check_of_a_named_set_that_is_absent_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_command(["check", "cifar10-jpeg"]) == 1
    shown = capsys.readouterr()
    assert "missing" in line(shown.out, "cifar10/")
    assert "toy" not in shown.out
    assert "1 file is damaged or missing" in shown.err


def test_get_of_what_is_here_asks_nobody(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_command(["get", "toy"]) == 0
    text = capsys.readouterr().out
    assert "licence: MIT" in text
    assert "toy/b.txt: good" in text


def test_get_of_what_nobody_publishes_tells_what_to_copy(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"they come from nobody\); copy tiny/c.txt.gz into {folder}"):
        data_command(["get", "toy", "tiny"])


def test_get_that_is_interrupted_tells_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "fetch", interrupted)
    assert data_command(["get", "toy"]) == 130
    assert "`trimtab data get toy` goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["get", "check"])
def test_an_unknown_name_names_the_nearest(word: str) -> None:
    with pytest.raises(DataError, match=r"unknown data set 'etth1'\. Did you mean ETTh1\?"):
        data_command([word, "etth1"])
    with pytest.raises(DataError, match="digits is in the package"):
        data_command([word, "digits"])


def test_what_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match=r"unknown command 'chekc'\. Did you mean check\? trimtab data list"):
        data_command(["chekc"])
    with pytest.raises(RecipeError, match="get which"):
        data_command(["get"])
    with pytest.raises(RecipeError, match="takes no names"):
        data_command(["list", "toy"])
    for words in ([], ["--help"], ["get", "--help"]):
        assert data_command(words) == 0
        assert "usage: trimtab data" in capsys.readouterr().out


def test_without_a_named_folder_data_lie_in_the_cache(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRIMTAB_DATA")
    assert data_folder() == cache
    (cache / "toy").mkdir(parents=True)
    (cache / "toy" / "a.txt").write_bytes(b"a")
    assert read_data(DATA_SETS["toy"], "a.txt") == b"a"

    monkeypatch.setenv("TRIMTAB_DATA", str(folder))
    (folder / "toy" / "a.txt").unlink()
    assert read_data(DATA_SETS["toy"], "a.txt") == b"a"  # the cache is looked into as well
    assert read_data(DATA_SETS["tiny"], "c.txt.gz") == b"cc"  # unpacked


def test_the_table_is_consistent() -> None:
    paths = [file.path for data in DATA_SETS.values() for file in data.files]
    assert len(set(paths)) == len(paths)
    for name, data in DATA_SETS.items():
        assert name == data.name
        assert data.files
        for file in data.files:
            assert len(bytes.fromhex(file.sha256)) == 32
            assert file.url is None or file.url.startswith("https://")
            assert file.url is None or file.url.endswith(Path(file.path).stem if file.packed else Path(file.path).name)


def test_a_checksum_of_another_file_is_noticed(folder: Path) -> None:
    toy = DATA_SETS["toy"]
    other = replace(toy, files=(replace(toy.files[0], sha256=sum_of(b"x")),))
    with pytest.raises(DataError, match=r"a\.txt is damaged"):
        read_data(other, "a.txt")


@real
@pytest.mark.data
def test_the_real_files_have_the_sizes_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    here = [data.name for data in DATA_SETS.values() if (data_folder() / data.files[0].path).exists()]
    assert here
    assert data_command(["check", *here]) == 0
    for data in (DATA_SETS[name] for name in here):
        for file in data.files:
            assert len(read_data(data, Path(file.path).name)) == file.size
