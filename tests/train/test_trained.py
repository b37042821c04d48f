"""Whoever uses a trained model gets the weights that the run's numbers are of."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_recipes import Sequences, Small
from torch import nn

from trimtab.errors import CheckpointError, RunFolderError
from trimtab.models import ViT
from trimtab.reparam.layers import Reparametrized
from trimtab.tasks.images import ImagesRecipe, vit_digits
from trimtab.tasks.recipe import Recipe
from trimtab.train import train
from trimtab.train.checkpoints import best_checkpoint, newest_checkpoint
from trimtab.train.trained import load_trained, open_trained

HERE = {"recipe_name": f"{Path(__file__).parents[1] / 'engine_recipes.py'}:Small"}


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"stabilizer": "sigma"}, {"stabilizer": "qk-norm", "ema": 0.5}])
def test_a_trained_model_scores_what_the_run_did(tmp_path: Path, changes: dict[str, object]) -> None:
    recipe = replace(vit_digits(), steps=10, watch_every=5, eval_every=5, batch_size=32, **changes)
    result = train(recipe, tmp_path)
    trained = open_trained(tmp_path, ImagesRecipe)
    model = load_trained(trained, lambda: ViT(trained.recipe.model))
    assert not model.training
    assert not any(isinstance(module, Reparametrized) for module in model.modules())
    task = recipe.task()
    assert task.evaluation is not None
    images, labels = task.evaluation.batch(torch.arange(task.evaluation.size), torch.Generator())
    score = task.score(model, (images, labels))  # type: ignore[misc]
    assert score["accuracy"].mean().item() == pytest.approx(result.metrics["accuracy"], abs=1e-6)
    assert score["eval_loss"].mean().item() == pytest.approx(result.metrics["eval_loss"], rel=1e-4)


def test_files_come_along_and_best_weights_where_they_count(tmp_path: Path) -> None:
    path = str(Path(__file__).parents[1] / "engine_recipes.py")
    train(Sequences(), tmp_path / "files", facts={"recipe_name": f"{path}:Sequences"})
    assert json.loads(open_trained(tmp_path / "files", Recipe).files["lengths.txt"])
    train(Small(patience=1, lr=1.0, steps=40), tmp_path / "best", facts=HERE)
    assert open_trained(tmp_path / "best", Recipe).checkpoint == best_checkpoint(tmp_path / "best")
    assert best_checkpoint(tmp_path / "best") != newest_checkpoint(tmp_path / "best")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(replace(vit_digits(), steps=2, watch_every=2, eval_every=2, batch_size=32), tmp_path)
    trained = open_trained(tmp_path, ImagesRecipe)

    def broken(folder: Path, model: nn.Module, average: object) -> None:
        nn.init.constant_(model.get_parameter("head.weight"), torch.inf)

    monkeypatch.setattr("trimtab.train.trained.load_weights", broken)
    with pytest.raises(CheckpointError, match=r"of a run that diverged: head\.weight is not finite"):
        load_trained(trained, lambda: ViT(trained.recipe.model))


def test_other_folders_are_refused_with_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no run folder that can be read, it has no run\.json: name the folder"):
        open_trained(tmp_path, Recipe)
    train(Small(), tmp_path / "small", facts=HERE)
    with pytest.raises(RunFolderError, match="holds a run of Small; expected one of ImagesRecipe"):
        open_trained(tmp_path / "small", ImagesRecipe)
    run_json = (tmp_path / "small" / "run.json").read_text()
    (tmp_path / "small" / "run.json").write_text(run_json[:100])
    with pytest.raises(RunFolderError, match=r"its run\.json or a file in files/ is damaged"):
        open_trained(tmp_path / "small", Recipe)
    (tmp_path / "small" / "run.json").write_text(run_json)
    for each in (tmp_path / "small" / "checkpoints").glob("step*"):
        for file in each.iterdir():
            file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints of .* is whole: copy them again, or train anew"
    ):
        open_trained(tmp_path / "small", Recipe)
    shutil.rmtree(tmp_path / "small" / "checkpoints")
    with pytest.raises(CheckpointError, match="no whole checkpoint yet"):
        open_trained(tmp_path / "small", Recipe)
    result = tmp_path / "small" / "result.json"
    result.write_text(result.read_text().replace('"finished"', '"diverged"'))
    with pytest.raises(CheckpointError, match="of a run that diverged before its first checkpoint: train anew"):
        open_trained(tmp_path / "small", Recipe)
