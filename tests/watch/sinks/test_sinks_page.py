import re
from pathlib import Path

import pytest
import torch

from trimtab.report.terminal import watch_command

PAGE = Path(__file__).parents[3] / "docs" / "sinks.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",  # Lightning's own use
    "ignore:The 'train_dataloader' does not have many workers",
)
def test_what_the_page_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in ("tensorboard", "wandb", "transformers", "accelerate", "lightning"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    import wandb

    begin = wandb.init  # offline costs seconds, and has a test of its own
    monkeypatch.setattr(wandb, "init", lambda **options: begin(**options | {"mode": "disabled"}))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # else the sink sets it, for good
    namespace: dict[str, object] = {}
    with torch.random.fork_rng():
        for number, block in enumerate(blocks("python")):
            exec(compile(block, f"docs/sinks.md, block {number}", "exec"), namespace)
    assert {path.parent.name for path in Path("runs").glob("*/run.json")} == {"x", "printed", "gpt2", "lightning"}
    assert "step 1: lowest entropy 0." in capsys.readouterr().out

    commands = "".join(blocks("sh")).splitlines()
    assert [command.split()[:2] for command in commands] == [
        ["trimtab", "watch"],
        ["pip", "install"],
        ["pip", "install"],
    ]
    assert watch_command(commands[0].split()[2:]) == 0
    assert "step 4" in capsys.readouterr().out
