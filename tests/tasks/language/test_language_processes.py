"""Two processes train and measure a GPT as one does."""

import os
from pathlib import Path

import pytest
from gloo_processes import in_processes

from trimtab.models.gpt import GPTConfig
from trimtab.tasks.language import LanguageRecipe
from trimtab.train import Hardware, Result, train


def run(folder: Path, name: str) -> Result:
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    recipe = LanguageRecipe(
        data=str(folder / "text.txt"),
        tokens="words",
        model=GPTConfig(None, context=8, dim=16, depth=1, num_heads=2),
        stabilizer="sigma",
        optimizer="sgd",  # Adam turns a rounding error in a gradient near zero into a step of full length
        lr=0.5,
        stride=3,
        batch_size=12,
        accumulate=3,
        steps=6,
        watch_every=3,
        eval_every=6,
    )
    return train(
        recipe, folder / name, hardware=Hardware(accelerator="cpu", strategy="ddp" if name == "two" else "auto")
    )


def check(rank: int, folder: str, metrics: dict[str, float], test: dict[str, float]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    result = run(Path(folder), "two")
    assert result.metrics == pytest.approx(metrics, rel=1e-4)  # float32 sums in another order, over six steps
    assert result.test == pytest.approx(test, rel=1e-4)


def test_two_processes_have_the_metrics_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = [f"a{number % 3} b{number % 4} c{number % 5} {'d ' * (number % 7)}\n" for number in range(300)]
    (tmp_path / "text.txt").write_text("".join(lines))
    one = run(tmp_path, "one")
    assert one.metrics["eval_loss"] < one.initial["eval_loss"]
    in_processes(2, check, str(tmp_path), one.metrics, one.test)
