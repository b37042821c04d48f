"""Every example runs, writes a run that can be read, and has at most ten lines of ours in it."""

import importlib.util
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.report.runlog import read_run

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(
    ("name", "needs", "steps", "heads"),
    [
        ("bare_loop", (), [1, 20, 40, 60, 80, 100], 8),
        ("nanogpt", (), [1, 20, 40, 60], 8),
        ("hf_trainer", ("transformers", "accelerate"), [1, 10, 20, 30, 40], 8),
        pytest.param(
            *("lightning_trainer", ("lightning",), [1, 20, 40, 60], 8),
            marks=pytest.mark.filterwarnings(
                r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
                "ignore:The 'train_dataloader' does not have many workers",
            ),
        ),
    ],
)
def test_an_example_runs_and_learns(
    name: str, needs: tuple[str, ...], steps: list[int], heads: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for library in needs:
        pytest.importorskip(library)
    with torch.random.fork_rng(), caplog.at_level(logging.WARNING, logger="trimtab"):
        load(name)(["--folder", str(tmp_path / "run")])
    run = read_run(tmp_path / "run")
    assert run.steps.tolist() == steps
    loss = run.column("loss")
    assert loss[-1] < 0.9 * loss[0]
    assert len(run.heads) == heads
    assert np.isfinite(run.entropy).all()
    assert not [record for record in caplog.records if record.name == "trimtab"]  # all was seen, no alarm


def test_our_part_is_about_ten_lines() -> None:
    examples = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "own_recipe.py")  # no loop of its own
    assert len(examples) == 4
    for example in examples:
        lines = example.read_text(encoding="utf-8").splitlines()
        ours = [line for line in lines if re.search(r"  # trimtab\b", line)]
        assert 3 <= len(ours) <= 10, example.name
