"""The package as a whole: a light import, and documents whose code runs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import trimtab
from trimtab.cli import main

ROOT = Path(__file__).parent.parent


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf8")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(found) == text.count(f"```{language}\n") > 0
    return found


def test_import_loads_torch_and_numpy_alone() -> None:
    code = (
        "import json, sys, torch; before = set(sys.modules); import trimtab; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new: list[str] = json.loads(done.stdout)
    roots = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
    assert roots <= {"trimtab", "torch", "numpy"}
    assert "trimtab.reparam" in new
    assert not [name for name in new if name.startswith("torch.distributed.tensor")]  # heavy, and only for shards


def test_every_public_name_has_a_docstring_and_exists() -> None:
    for name in trimtab.__all__:
        thing = getattr(trimtab, name)
        assert name.startswith("__") or thing.__doc__, name


def user_namespace() -> dict[str, object]:
    """What the README calls yours: a model of attention layers, and batches for it."""
    torch.manual_seed(0)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(x).mean(1))

    loader = [(torch.randn(4, 6, 16), torch.randint(0, 3, (4,))) for _ in range(3)]
    return {"model": Classifier(), "loader": loader}


@pytest.mark.parametrize("document", ["README.md", "docs/guide.md"])
def test_python_blocks_run_in_order(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks(document, "python")
    monkeypatch.chdir(tmp_path)
    namespace = user_namespace()
    for number, block in enumerate(code):
        exec(compile(block, f"{document}, block {number}", "exec"), namespace)
    assert list((tmp_path / "runs").iterdir())


@pytest.mark.usefixtures("fork_server")
def test_shell_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make` lines are dry runs here (they are how this suite is run); `trimtab` lines run for real, though shorter."""
    code = blocks("README.md", "sh")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    hours = [f"2024-01-{1 + hour // 24:02} {hour % 24:02}:00,{hour % 24}" for hour in range(720)]
    (tmp_path / "my-hours.csv").write_text("\n".join(["date,load", *hours]))
    ran = 0
    for line in "".join(code).splitlines():
        command = line.split("#")[0].split()
        if not command:
            continue
        if command[0] == "make":
            if shutil.which("make"):
                subprocess.run([*command, "--dry-run", "-C", str(ROOT)], check=True, capture_output=True)
        else:
            assert command[0] == "trimtab", line
            short = {
                "train": ["--steps", "2"],
                "compare": ["--steps", "1"],
                "forecast": ["--epochs", "1", "--lookback", "24"],
            }.get(command[1], [])
            words = {"1e-3:1e-1:5": "1e-2", "3": "1"} if command[1] == "compare" else {}
            assert main([*(words.get(word, word) for word in command[1:]), *short]) == 0, line
        ran += 1
    assert ran


def test_readme_pictures_and_links_exist() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf8")):
            assert "://" in target or (path.parent / target).exists(), target
