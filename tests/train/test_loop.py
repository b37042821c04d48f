"""What a run leaves behind, how it ends, and what it does not touch."""

import json
import math
import os
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_recipes import Small, assert_same, examples, lines, numbers, squared_error, trained
from torch import Tensor, nn

from trimtab.errors import DataError, RecipeError, RunFolderError
from trimtab.models import ViTConfig
from trimtab.stabilizers import stabilize_
from trimtab.tasks.images import ImagesRecipe, load_images, vit_digits
from trimtab.tasks.task import Task
from trimtab.train import Hardware, Progress, Result, read_result, train
from trimtab.train.checkpoints import load_weights, newest_checkpoint

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


def test_a_run_leaves_a_log_a_checkpoint_and_a_result(tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = train(TINY, tmp_path / "run", seen.append, facts={"arm": "mine"})
    assert (result.status, result.steps, result.folder) == ("finished", 5, tmp_path / "run")

    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == [1, 2, 4]
    assert ["accuracy" in line for line in logged] == [False, True, True]
    assert logged[0]["lr"] == [1e-2]
    assert [progress.step for progress in seen] == [1, 2, 4]
    assert seen[0].metrics == result.initial
    assert seen[-1].metrics == {name: logged[-1][name] for name in ("accuracy", "eval_loss")}
    assert (seen[-1].loss, seen[-1].lr, seen[-1].steps) == (logged[-1]["loss"], 1e-2, 5)
    assert 0 < seen[-1].entropy_min <= 1
    assert seen[-1].worst_head in ("blocks.0.attention head 0", "blocks.0.attention head 1")
    assert 0 < seen[0].seconds < seen[-1].seconds < result.seconds
    assert seen[-1].samples_per_second > 0

    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["task"], info["arm"], info["seed"], info["processes"]) == ("ImagesRecipe", "mine", 0, 1)
    assert info["recipe"]["lr"] == 1e-2
    assert info["recipe"]["model"]["dim"] == 16
    assert info["parameters"] == sum(p.numel() for p in TINY.task().model.parameters())
    assert read_result(tmp_path / "run") == result
    assert result.metrics["accuracy"] == max(result.best["accuracy"], result.metrics["accuracy"])
    assert result.samples_per_second == pytest.approx(32 / result.step_seconds)
    assert result.loader_samples_per_second > result.samples_per_second
    assert result.peak_memory_bytes > 2**20


def test_the_checkpoint_at_the_end_is_the_model_that_the_result_tells_of(tmp_path: Path) -> None:
    result = train(TINY, tmp_path)
    task = TINY.task()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert load_weights(newest, task.model) == 5
    images, labels = task.evaluation.batch(torch.arange(task.evaluation.size), torch.Generator())
    with torch.no_grad():
        logits = task.model.eval()(load_images(TINY.data).standardize(images))
    assert result.metrics["accuracy"] == (logits.argmax(dim=-1) == labels).double().mean().item()
    # the means of float32 losses, over batches of other sizes
    assert result.metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_it_learns(tmp_path: Path) -> None:
    recipe = replace(TINY, steps=60, watch_every=20, eval_every=20, model=replace(TINY.model, init="xavier"))
    assert train(recipe, tmp_path).metrics["accuracy"] > 0.5  # chance is 0.1


def weights(recipe: ImagesRecipe, folder: Path) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        model = stabilize_(recipe.task().model, recipe.stabilizer)
    newest = newest_checkpoint(folder)
    assert newest is not None
    load_weights(newest, model)
    return model.state_dict()


@pytest.mark.parametrize("stabilizer", ["none", "sigma"])
def test_the_same_recipe_gives_the_same_numbers(tmp_path: Path, stabilizer: str) -> None:
    recipe = replace(TINY, stabilizer=stabilizer)
    train(recipe, tmp_path / "first")
    torch.randn(7)  # the generator's state outside does not matter
    train(recipe, tmp_path / "second")
    assert numbers(tmp_path / "first") == numbers(tmp_path / "second")
    assert_same(weights(recipe, tmp_path / "first"), weights(recipe, tmp_path / "second"))


def test_another_seed_gives_other_numbers(tmp_path: Path) -> None:
    train(TINY, tmp_path / "first")
    train(replace(TINY, seed=1), tmp_path / "second")
    assert lines(tmp_path / "first")[0]["loss"] != lines(tmp_path / "second")[0]["loss"]


def test_watching_and_evaluating_change_nothing(tmp_path: Path) -> None:
    train(TINY, tmp_path / "often")
    train(replace(TINY, watch_every=50, eval_every=50, checkpoint_every=2), tmp_path / "seldom")
    train(replace(TINY, watch=False), tmp_path / "unwatched")
    for other in ("seldom", "unwatched"):
        assert_same(weights(TINY, tmp_path / "often"), weights(TINY, tmp_path / other))
    unwatched = numbers(tmp_path / "unwatched")
    assert [set(line) - {"accuracy", "eval_loss"} for line in unwatched] == [{"step", "loss", "lr", "alarms"}] * 3
    for line, watched in zip(unwatched, numbers(tmp_path / "often"), strict=True):
        assert line == {name: watched[name] for name in line} | {"alarms": []}


def test_the_outside_is_left_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(TINY, tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert sys.float_info.min / 2 > 0  # denormals are numbers again


def test_a_run_that_diverges_is_a_result_and_saves_nothing_more(tmp_path: Path) -> None:
    # the first step makes the weights so large that the second loss is not finite
    recipe = replace(TINY, optimizer="sgd", lr=1e30, steps=50, watch_every=5, eval_every=10, checkpoint_every=1, keep=9)
    result = train(recipe, tmp_path)
    assert (result.status, result.steps) == ("diverged", 5)  # the first logged step after it
    assert not math.isfinite(result.loss)
    assert result.metrics["accuracy"] == 0  # logits that are not finite answer nothing
    assert not math.isfinite(result.metrics["eval_loss"])
    last = lines(tmp_path)[-1]
    assert (last["step"], last["accuracy"]) == (5, 0)
    assert last["loss"] in ("nan", "inf")
    assert json.loads((tmp_path / "result.json").read_text())["loss"] in ("nan", "inf")
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == ["step-00000001"]
    again = train(recipe, tmp_path)
    assert (again.status, again.steps) == ("diverged", 5)


@dataclass(frozen=True, kw_only=True)
class Cliff(Small):
    """Its loss is always finite; the gradient of one step is not."""

    at: int = 8

    def task(self) -> Task:
        task, forwards = super().task(), iter(range(1, 99))

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            zero = 0 * model[0].bias.sum()
            return squared_error(model, batch) + (zero.sqrt() if next(forwards) == self.at else zero)

        return replace(task, loss=loss)


@pytest.mark.parametrize("steps", [20, 8], ids=["going on", "last step"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, steps: int) -> None:
    recipe = Cliff(steps=steps, checkpoint_every=2, keep=1, eval_every=100)
    result = train(recipe, tmp_path)
    assert (result.status, result.steps) == ("diverged", 8)
    assert math.isfinite(result.loss)
    assert math.isnan(result.metrics["eval_loss"])
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000006"]
    train(Small(steps=6), tmp_path / "until then")
    assert_same(trained(recipe, tmp_path), trained(recipe, tmp_path / "until then"))


def _one_loss_each(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(dim=-1)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"loss": _one_loss_each}, r"got one of shape \(16,\): take the mean over the examples"),
        ({"loss": lambda model, batch: squared_error(model, batch).item()}, "got float"),
        ({"loss": lambda model, batch: squared_error(model, batch).detach()}, "got one without a gradient"),
        ({"score": _one_loss_each}, "score must be a dict of tensors by name, .* got Tensor"),
        ({"score": lambda model, batch: {}}, "got an empty one"),
        (None, "Wrong.task must return a Task, it returned Sequential"),
    ],
)
def test_a_task_with_a_mistake_is_told_of_it(tmp_path: Path, part: dict[str, object] | None, message: str) -> None:
    class Wrong(Small):
        def task(self) -> Task:
            task = super().task()
            return task.model if part is None else replace(task, **part)

    with pytest.raises(RecipeError, match=message):
        train(Wrong(), tmp_path)


def test_one_optimizer_that_is_not_in_a_list(tmp_path: Path) -> None:
    class Single(Small):
        def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
            return torch.optim.SGD(model.parameters(), self.lr)

    with pytest.raises(RecipeError, match="must return a list of torch optimisers, got SGD"):
        train(Single(), tmp_path)


def test_a_full_disk_at_the_end_costs_the_result_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("trimtab.train.progress.write_json", full)
        with pytest.raises(RunFolderError, match=r"result\.json: No space left .* the same command ends the run"):
            train(Small(), tmp_path / "twice")
    again = train(Small(), tmp_path / "twice")
    once = train(Small(), tmp_path / "once")
    assert (again.steps, again.metrics, again.test) == (once.steps, once.metrics, once.test)


def test_going_on_elsewhere_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(Small(), tmp_path)
    (tmp_path / "result.json").unlink()
    info = json.loads((tmp_path / "run.json").read_text()) | {"accelerator": "cuda"}
    (tmp_path / "run.json").write_text(json.dumps(info))
    train(Small(), tmp_path)
    (record,) = caplog.records
    assert "accelerator cuda then, cpu now" in record.message


def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(DataError, match="digit"):
        train(replace(TINY, data="digit"), folder)
    with pytest.raises(RecipeError, match="digits needs model in_channels 1, the recipe has 3"):
        train(replace(TINY, model=replace(TINY.model, in_channels=3)), folder)
    with pytest.raises(RecipeError, match="batch_size 80 is larger than the 70 training examples"):
        train(Small(batch_size=80), folder)
    with pytest.raises(RecipeError, match="there is no stabilizer 'sigm'; did you mean sigma"):
        train(replace(TINY, stabilizer="sigm"), folder)
    with pytest.raises(RecipeError, match="patience needs examples to evaluate on"):
        train(Blind(patience=2), folder)
    with pytest.raises(RecipeError, match=r'"fp16" needs a GPU: use "bf16" or "32"'):
        train(Small(precision="fp16"), folder, hardware=Hardware(accelerator="cpu"))
    with pytest.raises(RecipeError, match=r"'fsdp' shares the work of several processes, and there is one"):
        train(Small(), folder, hardware=Hardware(accelerator="cpu", strategy="fsdp"))
    assert not folder.exists() or not list(folder.iterdir())
    assert train(Small(steps=1), folder).status == "finished"


class Blind(Small):
    """It has nothing to evaluate on."""

    def task(self) -> Task:
        return Task(nn.Linear(4, 1), examples(70, 1), squared_error)


def test_a_task_without_evaluation_is_trained_too(tmp_path: Path) -> None:
    result = train(Blind(), tmp_path)
    assert (result.status, result.steps, result.metric) == ("finished", 12, None)
    assert result.initial == result.metrics == result.best == result.test == {}


@dataclass(frozen=True, kw_only=True)
class Scripted(Small):
    """Its metric at each evaluation is written down beforehand; its weights are as they are trained."""

    script: tuple[float, ...] = ()

    def task(self) -> Task:
        task = super().task()
        told = iter((9.0, *self.script))  # before the first step

        def score(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            return {"gain": torch.full((len(batch[0]),), next(told, 0.0))}

        return replace(task, test=None, score=score, metric="gain", higher_is_better=True)


def test_it_stops_early_and_keeps_the_best_weights(tmp_path: Path) -> None:
    recipe = Scripted(steps=99, eval_every=4, patience=2, script=(1.0, 3.0, math.nan, 3.0))
    result = train(recipe, tmp_path / "early")
    # 9.0 was before training; 3.0 at step 8 is the best, NaN is no better, and as good is not better
    assert (result.status, result.steps) == ("stopped early", 16)
    assert (result.best, result.best_step) == ({"gain": 3.0}, 8)
    train(Scripted(steps=8), tmp_path / "until then")
    best = json.loads((tmp_path / "early" / "checkpoints" / "best.json").read_text())
    assert best == {"step": 8, "metrics": {"gain": 3.0}}
    with torch.random.fork_rng():
        model = recipe.task().model
    load_weights(tmp_path / "early" / "checkpoints" / "step-00000008", model)
    assert_same(model.state_dict(), trained(recipe, tmp_path / "until then"))


def test_without_patience_the_best_of_those_that_are_saved_stays(tmp_path: Path) -> None:
    script = (5.0, 4.0, 3.0, 2.0, 3.5, 1.0)  # at steps 2, 4 ... 12; saved are 4, 8 and 12
    train(Scripted(watch_every=2, eval_every=2, checkpoint_every=4, keep=1, script=script), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("checkpoints/step-*")) == ["step-00000004", "step-00000012"]
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best == {"step": 4, "metrics": {"gain": 4.0}}


def test_best_weights_that_are_damaged_are_not_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Scripted(steps=40, patience=2, script=(3.0, 2.0, 1.0))
    assert train(recipe, tmp_path).best_step == 4
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoints" / "step-00000004" / "model.safetensors").unlink()
    assert train(recipe, tmp_path).status == "stopped early"
    (record,) = caplog.records
    assert "no whole checkpoint of the best weights" in record.message


def test_the_test_is_taken_with_the_best_weights(tmp_path: Path) -> None:
    recipe = Small(steps=80, lr=0.3, optimizer="sgd", eval_every=4, patience=1)
    result = train(recipe, tmp_path)
    assert result.status == "stopped early"
    assert result.metrics == result.best
    task = recipe.task()
    load_weights(tmp_path / "checkpoints" / f"step-{result.best_step:08d}", task.model)
    until_then = train(replace(recipe, steps=result.best_step, patience=None), tmp_path / "until then")
    assert result.test == until_then.test


def test_it_ends_when_its_time_is_over(tmp_path: Path) -> None:
    result = train(Small(steps=10**9, seconds=0.2, schedule="cosine", watch_every=1, eval_every=10**9), tmp_path)
    assert result.status == "out of time"
    assert result.seconds >= 0.2
    assert result.metrics  # the end is evaluated
    rates = [line["lr"][0] for line in lines(tmp_path)]
    assert rates[0] > 0.5e-2
    assert rates[-1] < 0.5e-2  # by steps alone, the cosine would not have begun to fall
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_call_goes_on_to_the_same_end(number: int, tmp_path: Path) -> None:
    recipe = Small(ema=0.9, steps=40)

    def stop(progress: Progress) -> None:
        if progress.step == 8:
            os.kill(os.getpid(), number)

    result = train(recipe, tmp_path / "twice", stop)
    assert result.status == "interrupted"
    assert result.steps in (8, 9)
    assert not (tmp_path / "twice" / "result.json").exists()
    ended = train(recipe, tmp_path / "twice")
    whole = train(recipe, tmp_path / "once")
    assert (ended.status, ended.metrics, ended.test) == (whole.status, whole.metrics, whole.test)
    assert ended.seconds > result.seconds
    assert_same(trained(recipe, tmp_path / "twice"), trained(recipe, tmp_path / "once"))
    assert numbers(tmp_path / "twice") == numbers(tmp_path / "once")


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(Small(), tmp_path, stop)
    assert train(Small(), tmp_path).status == "finished"


def test_bfloat16_is_near(tmp_path: Path) -> None:
    recipe = replace(TINY, steps=20, watch_every=10, eval_every=10)
    plain = train(recipe, tmp_path / "plain")
    half = train(replace(recipe, precision="bf16"), tmp_path / "half")
    assert half.metrics["eval_loss"] != plain.metrics["eval_loss"]
    assert half.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=0.05)  # 8 bits of mantissa
    assert {tensor.dtype for tensor in weights(recipe, tmp_path / "half").values()} == {torch.float32}


def test_a_compiled_model_trains_as_the_plain_one(tmp_path: Path) -> None:
    plain = Small(dropout=0.0, optimizer="sgd")
    result = train(plain, tmp_path / "plain")
    compiled = train(replace(plain, compile=True), tmp_path / "compiled")
    assert compiled.metrics == pytest.approx(result.metrics, rel=1e-4)  # fused kernels round otherwise
    found = trained(plain, tmp_path / "compiled")
    for name, tensor in trained(plain, tmp_path / "plain").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


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
    accuracies = [result.metrics["accuracy"] for result, _ in found]
    if arm == "sigma":
        assert min(accuracies) >= 0.85, accuracies
    else:
        assert max(accuracies) <= 0.80, accuracies
        assert max(low for _, low in found) < 0.03
