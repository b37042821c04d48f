import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from trimtab.cli import main
from trimtab.errors import DataError

COMMANDS = (
    "demo",
    "train",
    "compare",
    "recipes",
    "report",
    "watch",
    "generate",
    "translate",
    "transcribe",
    "forecast",
    "inspect",
    "data",
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int]], None]:
    """Let another function stand in for `trimtab data`."""

    def replace(function: Callable[[list[str]], int]) -> None:
        module = types.ModuleType("trimtab.tasks.data.command")
        module.data_command = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "trimtab.tasks.data.command", module)

    return replace


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    from trimtab import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trimtab {__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(line.split()) > 3
        assert len(line) <= 80


def test_help_loads_nothing_of_the_lab() -> None:
    code = (
        "import sys; from trimtab.cli import main; main(['--help']); "
        "sys.exit(bool({'tyro', 'rich', 'plotly', 'safetensors', 'lightning_fabric', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert len(out) > 100
    assert err == ""


def test_a_command_gets_its_words_and_gives_the_exit_code(
    command: Callable[[Callable[[list[str]], int]], None],
) -> None:
    function = Mock(return_value=1)
    command(function)
    assert main(["data", "check", "--all"]) == 1
    function.assert_called_once_with(["check", "--all"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tran"], "error: unknown command tran. Did you mean train? There are: "),
        (["zzz"], "error: unknown command zzz. There are: demo, train, compare, "),
        (["demo", "--fodler", "x"], "error: unknown field --fodler. Did you mean --folder?"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("the data are damaged"), "the data are damaged"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "there is not enough memory for this model and batch: make them smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory"),
        (ModuleNotFoundError("no", name="tyro"), "this command needs tyro: pip install 'trimtab[lab]'"),
        (ModuleNotFoundError("no", name="lightning_fabric"), "needs lightning_fabric: pip install 'trimtab[lab]'"),
        (ModuleNotFoundError("no", name="matplotlib.pyplot"), "needs matplotlib: pip install 'trimtab[lab]'"),
        (ModuleNotFoundError("no", name="ray.util"), "this command needs ray: pip install 'trimtab[ray]'"),
    ],
)
def test_what_a_user_can_act_on_has_no_traceback(
    error: Exception,
    message: str,
    command: Callable[[Callable[[list[str]], int]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(Mock(side_effect=error))
    assert main(["data", "list"]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: ")
    assert out == ""


@pytest.mark.parametrize("error", [RuntimeError("a bug of ours"), ModuleNotFoundError("no", name="trimtab.nothing")])
def test_a_bug_keeps_its_traceback(error: Exception, command: Callable[[Callable[[list[str]], int]], None]) -> None:
    command(Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        main(["data", "list"])
    assert raised.value is error


def test_a_library_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["train", "vit-digits"]) == 2
    assert capsys.readouterr().err == "error: this command needs tyro: pip install 'trimtab[lab]'\n"


@pytest.mark.parametrize(("code", "expected", "said"), [(None, 0, ""), (3, 3, ""), ("enough", 2, "error: enough\n")])
def test_an_exit_keeps_its_code_and_its_words(
    code: int | str | None,
    expected: int,
    said: str,
    command: Callable[[Callable[[list[str]], int]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(Mock(side_effect=SystemExit(code)))
    assert main(["data", "list"]) == expected
    assert capsys.readouterr().err == said


def test_ctrl_c_is_exit_code_130(
    command: Callable[[Callable[[list[str]], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(Mock(side_effect=KeyboardInterrupt))
    assert main(["data", "list"]) == 130
    assert "stopped" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    command = [sys.executable, "-m", "trimtab", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_the_module_is_the_command_and_writes_to_a_terminal_without_unicode(tmp_path: Path) -> None:
    """Of a message that it cannot write it writes what it can: the name that is unknown here has an ø."""
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", "nøpe"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown command n?pe.")
    assert done.stderr.count("\n") == 1
