import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from trimtab.cli import main


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    from trimtab import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trimtab {__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "demo" in out
    assert "train" in out


def test_help_loads_nothing_of_the_lab() -> None:
    code = (
        "import sys; from trimtab.cli import main; main(['--help']); "
        "sys.exit(bool({'tyro', 'rich', 'plotly', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_train_without_a_name_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 0
    out = capsys.readouterr().out
    assert "vit-digits" in out
    assert "vit-fashion" in out


def test_train_trains_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--steps 4 --watch-every 2 --eval-every 2 --lr 3e-3 --stabilizer sigma --gamma-init one --dim 16 --norm none"
    )
    assert main(["train", "vit-digits", *words.split(), "--folder", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("step 1/4  loss ")
    assert "lr 0.003" in lines[0]
    for word in ("accuracy 0.", "lowest entropy 0.", "samples/s", "0 s left"):
        assert word in lines[2], word
    assert lines[-2].startswith("finished after 4 steps: test accuracy 0.")
    assert lines[-1] == f"run folder: {tmp_path / 'run'}"
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert (recipe["lr"], recipe["stabilizer"], recipe["gamma_init"]) == (3e-3, "sigma", "one")
    assert (recipe["model"]["dim"], recipe["model"]["norm"]) == (16, "none")
    assert recipe["model"]["depth"] == 4  # the recipe's own, where no flag was given

    assert main(["train", "vit-digits", "--folder", str(tmp_path / "run")]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tran"], "unknown command 'tran'. Did you mean 'train'?"),
        (["train", "vit-digit"], "unknown recipe 'vit-digit'. Did you mean 'vit-digits'?"),
        (["train", "vit-digits", "--lr", "-1"], "lr must be a positive number, got -1.0"),
        (["train", "vit-digits", "--watch-every", "7"], "eval_every must be a multiple of watch_every"),
        (["train", "vit-digits", "--data", "digit"], "unknown image data set 'digit'. Did you mean 'digits'?"),
        (["train", "vit-digits", "--seed", "99999999999999999999"], "seed must be at least 0 and below 2^63"),
        (["train", "--folder", "x"], "a recipe's name comes first"),
        (["train", "vit-fashion"], "set TRIMTAB_DATA to the folder that holds it"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", [["--lrr", "1"], ["--steps", "many"], ["--norm", "rms"], ["--lr"], ["--dim", "63"]])
def test_a_wrong_flag_is_explained_and_exit_code_2(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vit-digits", *flag]) == 2
    assert flag[0].strip("-") in capsys.readouterr().err


def test_a_recipes_help_shows_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vit-digits", "--help"]) == 0
    out = capsys.readouterr().out
    for flag in ("--lr", "--stabilizer", "--norm", "--folder"):
        assert flag in out
    assert "--recipe" not in out


def test_a_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["train", "vit-digits"]) == 2
    assert "pip install 'trimtab[lab]'" in capsys.readouterr().err


def test_an_unwritable_folder_is_an_error_not_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    words = ["train", "vit-digits", "--steps", "1", "--folder", str(tmp_path / "file" / "run")]
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_too_little_memory_is_an_error_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "vit-digits", "--folder", str(tmp_path / "run")]
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr("trimtab.train.loop.build_model", Mock(side_effect=error))
        assert main(words) == 2
        assert "not enough memory" in capsys.readouterr().err
    monkeypatch.setattr("trimtab.train.loop.build_model", Mock(side_effect=RuntimeError("a bug of ours")))
    with pytest.raises(RuntimeError, match="a bug of ours"):  # what is no user's error keeps its traceback
        main(words)


def test_a_terminal_without_unicode_is_written_to_all_the_same() -> None:
    command = [sys.executable, "-m", "trimtab.cli", "train"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0
    assert b"vit-digits" in done.stdout


def test_ctrl_c_is_exit_code_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.train.loop.train", interrupted)
    assert main(["train", "vit-digits", "--folder", str(tmp_path / "run")]) == 130
    assert "stopped" in capsys.readouterr().err


def test_the_installed_command_fails_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trimtab.cli", "train", "nope"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown recipe 'nope'.")
    assert "Traceback" not in done.stderr
