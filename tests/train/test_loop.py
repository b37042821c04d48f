import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from trimtab.errors import DataError, RecipeError, RunFolderError
from trimtab.models import ViTConfig
from trimtab.reparam import effective_weight
from trimtab.tasks.images import ImagesRecipe, load_images, vit_digits
from trimtab.train import Progress, Result, build_model, load_checkpoint, loop, train

TINY = replace(
    vit_digits(),
    model=ViTConfig(8, 4, 1, 10, dim=16, depth=1, num_heads=2),
    lr=1e-2,
    steps=5,
    batch_size=32,
    watch_every=2,
    eval_every=2,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on two threads, and much slower when the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[dict[str, object]]:
    """The log without its clock."""
    return [{name: value for name, value in line.items() if name != "time"} for line in lines(folder)]


def saved(recipe: ImagesRecipe, folder: Path) -> dict[str, torch.Tensor]:
    model = build_model(recipe)
    load_checkpoint(folder / "checkpoints" / "last.safetensors", model)
    return model.state_dict()


def assert_same_weights(recipe: ImagesRecipe, first: Path, second: Path) -> None:
    other = saved(recipe, second)
    for name, tensor in saved(recipe, first).items():
        assert torch.equal(tensor, other[name]), name


def test_a_run_leaves_a_log_a_checkpoint_and_a_result(tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = train(TINY, tmp_path / "run", seen.append)
    assert (result.status, result.steps, result.folder) == ("finished", 5, tmp_path / "run")

    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == [1, 2, 4]
    assert ["accuracy" in line for line in logged] == [False, True, True]
    assert logged[0]["lr"] == [1e-2]
    assert [progress.step for progress in seen] == [1, 2, 4]
    assert seen[-1].accuracy == logged[-1]["accuracy"]
    assert seen[-1].loss == logged[-1]["loss"]
    assert 0 < seen[-1].entropy_min <= 1

    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["recipe"]["lr"] == 1e-2
    assert info["recipe"]["model"]["dim"] == 16
    assert info["seed"] == 0
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["status"] == "finished"
    assert written["accuracy"] == result.accuracy

    # the checkpoint is the model whose accuracy the result states
    model = build_model(TINY)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors", model) == 5
    assert loop.accuracy(model, load_images("digits")) == result.accuracy


def test_it_learns(tmp_path: Path) -> None:
    recipe = replace(TINY, steps=60, watch_every=20, eval_every=20, model=replace(TINY.model, init="xavier"))
    assert train(recipe, tmp_path).accuracy > 0.5  # chance is 0.1


@pytest.mark.parametrize("stabilizer", ["none", "sigma"])
def test_the_same_recipe_gives_the_same_numbers(tmp_path: Path, stabilizer: str) -> None:
    recipe = replace(TINY, stabilizer=stabilizer)
    train(recipe, tmp_path / "first")
    torch.randn(7)  # the generator's state outside does not matter
    train(recipe, tmp_path / "second")
    assert numbers(tmp_path / "first") == numbers(tmp_path / "second")
    assert_same_weights(recipe, tmp_path / "first", tmp_path / "second")


def test_another_seed_gives_other_numbers(tmp_path: Path) -> None:
    train(TINY, tmp_path / "first")
    train(replace(TINY, seed=1), tmp_path / "second")
    assert lines(tmp_path / "first")[0]["loss"] != lines(tmp_path / "second")[0]["loss"]


def test_watching_and_evaluating_change_nothing(tmp_path: Path) -> None:
    train(TINY, tmp_path / "often")
    train(replace(TINY, watch_every=50, eval_every=50), tmp_path / "seldom")
    assert_same_weights(TINY, tmp_path / "often", tmp_path / "seldom")


def test_the_outside_is_left_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train(TINY, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.float_info.min / 2 > 0  # denormals are numbers again


def test_init_scale_starts_where_sigma_does_and_is_a_plain_model() -> None:
    recipe = replace(TINY, stabilizer="sigma", gamma_init="one", model=replace(TINY.model, norm="none"))
    torch.manual_seed(0)
    steadied = build_model(recipe)
    torch.manual_seed(0)
    control = build_model(replace(recipe, stabilizer="init-scale"))
    assert type(control.head) is nn.Linear
    assert not any("gamma" in name for name, _ in control.named_parameters())
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(control(images), steadied(images))


def test_sigma_without_norm_is_what_the_recipe_says() -> None:
    recipe = replace(TINY, stabilizer="sigma", gamma_init="one", model=replace(TINY.model, norm="none"))
    model = build_model(recipe)
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    for name in ("query", "key", "value", "out"):
        weight = effective_weight(getattr(model.blocks[0].attention, name))
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=1e-4)
    weight = effective_weight(model.patches).flatten(1)
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=1e-4)


def test_a_run_that_diverges_is_a_result(tmp_path: Path) -> None:
    # the first step makes the weights so large that the second loss is not finite
    recipe = replace(TINY, optimizer="sgd", lr=1e30, steps=50, watch_every=5, eval_every=10)
    result = train(recipe, tmp_path)
    assert (result.status, result.steps) == ("diverged", 5)  # the first logged step after it
    assert not math.isfinite(result.loss)
    assert result.accuracy == 0  # logits that are not finite answer nothing
    last = lines(tmp_path)[-1]
    assert last["step"] == 5
    assert last["loss"] in ("nan", "inf")
    assert last["accuracy"] == 0
    assert json.loads((tmp_path / "result.json").read_text())["loss"] in ("nan", "inf")


@pytest.mark.parametrize("content", ["steps.jsonl", "notes.txt"])
def test_a_folder_in_use_is_refused_untouched(tmp_path: Path, content: str) -> None:
    (tmp_path / content).write_text("mine")
    with pytest.raises(RunFolderError, match="is not empty"):
        train(TINY, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [content]
    assert (tmp_path / content).read_text() == "mine"
    with pytest.raises(RunFolderError, match="is a file"):
        train(TINY, tmp_path / content)


def test_what_cannot_be_trained_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(DataError, match=r"unknown image data set 'digit'\. Did you mean 'digits'"):
        train(replace(TINY, data="digit"), folder)
    with pytest.raises(RecipeError, match="digits needs model in_channels 1, the recipe has 3"):
        train(replace(TINY, model=replace(TINY.model, in_channels=3)), folder)
    with pytest.raises(RecipeError, match="batch_size 2000 is larger than digits's 1,437 images"):
        train(replace(TINY, batch_size=2000), folder)
    assert not folder.exists()


def test_an_error_in_the_callback_ends_the_run_and_keeps_the_log(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, stop)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert not (tmp_path / "result.json").exists()


def test_learning_rate_warms_up_then_follows_its_schedule() -> None:
    recipe = replace(TINY, lr=1.0, warmup_steps=4, steps=12)
    rates = [loop.learning_rate(recipe, step) for step in range(1, 13)]
    assert rates == [0.25, 0.5, 0.75, 1.0, *[1.0] * 8]
    rates = [loop.learning_rate(replace(recipe, schedule="cosine"), step) for step in range(1, 13)]
    assert rates[3] == 1
    assert rates[7] == pytest.approx(0.5)  # half-way between step 4 and step 12
    assert rates[11] == pytest.approx(0)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_every_pass_sees_every_image_once_in_a_new_order() -> None:
    order = loop.batches(10, 3, seed=0)
    first = torch.cat([next(order) for _ in range(3)])
    second = torch.cat([next(order) for _ in range(3)])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 9
    assert first.tolist() != second.tolist()
    again = loop.batches(10, 3, seed=0)
    assert torch.equal(torch.cat([next(again) for _ in range(3)]), first)


def test_clip_and_weight_decay_reach_the_optimiser(tmp_path: Path) -> None:
    """With SGD one step moves the weights by lr times the clipped gradient, so by lr * clip at most."""
    recipe = replace(TINY, optimizer="sgd", lr=1.0, steps=1, clip=1e-3)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        start = build_model(recipe).state_dict()
    train(recipe, tmp_path / "clipped")
    moved = sum((tensor - start[name]).square().sum() for name, tensor in saved(recipe, tmp_path / "clipped").items())
    assert moved.sqrt().item() == pytest.approx(1e-3, rel=1e-3)
    train(replace(recipe, weight_decay=0.5), tmp_path / "decayed")
    norm = saved(recipe, tmp_path / "decayed")["position"].norm() / start["position"].norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-2)


def _runs(recipe: ImagesRecipe, folder: Path) -> list[tuple[Result, float]]:
    """Seeds 0 to 4: the result, and the lowest normalised entropy that was logged."""
    found = []
    for seed in range(5):
        result = train(replace(recipe, seed=seed), folder / str(seed))
        found.append((result, min(line["entropy_min"] for line in lines(folder / str(seed)))))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["none", "sigma"])
def test_the_demo_holds_over_five_seeds(tmp_path: Path, arm: str) -> None:
    from trimtab.demo import demo_recipes

    found = _runs(demo_recipes()[f"{arm}-lr0.03-seed0"], tmp_path)
    accuracies = [result.accuracy for result, _ in found]
    if arm == "sigma":
        assert min(accuracies) >= 0.85, accuracies
    else:
        assert max(accuracies) <= 0.80, accuracies
        assert max(low for _, low in found) < 0.03
