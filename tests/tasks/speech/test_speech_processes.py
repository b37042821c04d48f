"""Two processes that share a step, or a measurement, do what one does."""

import os
from pathlib import Path

import pytest
import torch
from gloo_processes import in_processes
from speech_corpus import recipe, write_corpus

from trimtab.tasks.speech import SpeechRecipe
from trimtab.tasks.task import Task
from trimtab.train.evaluate import evaluate
from trimtab.train.hardware import Hardware, distributed, launched
from trimtab.train.step import step_function


def drawn(own: SpeechRecipe) -> Task:
    torch.manual_seed(0)
    return own.task()


def stepped_and_measured(own: SpeechRecipe, shares: list[torch.Tensor]) -> dict[str, float]:
    """The metrics of the test set after two steps of given utterances."""
    with launched(Hardware(accelerator="cpu"), "32") as fabric:
        task = drawn(own)
        model = distributed(fabric, task.model, compiled=False)
        step = step_function(fabric, model, task, own.optimizers(task.model), own)
        batch = task.train.batch(shares[fabric.global_rank], torch.Generator())
        step([batch])
        step([batch])
        return evaluate(fabric, model, task, task.test, own)


def check(rank: int, own: SpeechRecipe, metrics: dict[str, float]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    found = stepped_and_measured(own, [torch.tensor([0, 1, 2]), torch.tensor([3])])
    assert found == pytest.approx(metrics, rel=1e-4)  # sums in float32 in another order


def test_two_processes_step_and_measure_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = recipe(write_corpus(tmp_path / "corpus"), optimizer="sgd", lr=0.1)
    metrics = stepped_and_measured(own, [torch.arange(4)])
    in_processes(2, check, own, metrics)
