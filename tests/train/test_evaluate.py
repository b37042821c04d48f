import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from engine_recipes import Small
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.tasks.task import Examples, Task
from trimtab.train.evaluate import _shares, evaluate
from trimtab.train.hardware import Hardware, launched

VALUES = torch.tensor([1e8, 1.0, -1e8, 3.0, 5.0, 7.0, 9.0])


def task(score: Callable[[nn.Module, Tensor], dict[str, Tensor]], **options: object) -> Task:
    examples = Examples(7, lambda indices, generator: VALUES[indices])
    return Task(nn.Dropout(), examples, lambda model, batch: batch.mean(), examples, None, score, **options)


def measured(found: Task, batch_size: int = 3) -> dict[str, float]:
    assert found.evaluation is not None
    with launched(Hardware(accelerator="cpu"), "32") as fabric:
        return evaluate(fabric, found.model, found, found.evaluation, Small(batch_size=batch_size))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_every_example_counts_once_in_float64(batch_size: int) -> None:
    means = measured(task(lambda model, batch: {"eval_loss": batch}), batch_size)
    assert means == {"eval_loss": 25 / 7}  # in float32, 1e8 + 1 - 1e8 is 0


@pytest.mark.parametrize(("micro_batches", "sizes"), [(1, [2, 2, 2, 1]), (2, [4, 3]), (4, [7])])
def test_as_many_examples_are_measured_at_once_as_the_recipe_says(micro_batches: int, sizes: list[int]) -> None:
    seen: list[int] = []

    def score(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        seen.append(len(batch))
        return {"eval_loss": batch}

    found = task(score)
    recipe = Small(batch_size=4, accumulate=2, eval_micro_batches=micro_batches)
    with launched(Hardware(accelerator="cpu"), "32") as fabric:
        assert evaluate(fabric, found.model, found, found.train, recipe) == {"eval_loss": 25 / 7}
    assert seen == sizes


def test_it_measures_in_eval_mode_without_gradients_and_puts_everything_back() -> None:
    def score(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        torch.randn(3)
        return {"eval_loss": model(torch.ones(len(batch)))}

    found = task(score)
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert measured(replace(found, model=model)) == {"eval_loss": 1.0}
    assert [module.training for module in (model, *model)] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_prepared_is_made_once_for_all_batches_as_they_are_measured() -> None:
    made: list[Tensor] = []

    def prepare(model: nn.Module) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not model.training
        made.append(model(torch.ones(1)) + torch.rand(1))
        return made[-1]

    found = task(lambda model, batch, prepared: {"eval_loss": prepared.expand(len(batch))}, prepare=prepare)
    found.model.train()
    before = torch.get_rng_state()
    assert measured(found) == {"eval_loss": made[0].item()}
    assert len(made) == 1
    assert torch.equal(torch.get_rng_state(), before)  # training goes on as if nothing had been measured


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    def score(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"eval_loss": torch.where(batch == 3, bad, batch)}

    assert not math.isfinite(measured(task(score))["eval_loss"])


def test_a_summary_makes_metrics_of_the_means() -> None:
    found = task(
        lambda model, batch: {"words": torch.ones(len(batch)), "errors": (batch > 4).float()},
        summarize=lambda means, size: {"rate": means["errors"] / means["words"], "size": size},
        metric="rate",
    )
    assert measured(found) == {"rate": pytest.approx(4 / 7), "size": 7}


def test_wrong_scores_are_refused_with_what_to_do() -> None:
    with pytest.raises(RecipeError, match=r"shape \(7,\); 'eval_loss' is \(\): take no mean over the batch"):
        measured(task(lambda model, batch: {"eval_loss": batch.mean()}))
    with pytest.raises(RecipeError, match=r"'eval_loss' is float"):
        measured(task(lambda model, batch: {"eval_loss": 1.0}))
    with pytest.raises(RecipeError, match="decides by the metric 'accuracy', and measures eval_loss"):
        measured(task(lambda model, batch: {"eval_loss": batch}, metric="accuracy"))
    with pytest.raises(RecipeError, match="a line of the log has a 'loss' of its own"):
        measured(task(lambda model, batch: {"loss": batch}, metric="loss"))


@pytest.mark.parametrize(("size", "processes"), [(7, 1), (7, 2), (7, 3), (2, 3), (1, 4), (12, 3)])
def test_processes_share_the_examples_and_make_equally_many_forwards(size: int, processes: int) -> None:
    examples, recipe = Examples(size, lambda indices, generator: indices), Small(batch_size=processes)
    shares = [list(_shares(examples, recipe, rank, processes)) for rank in range(processes)]
    assert len({tuple(len(indices) for indices, _ in share) for share in shares}) == 1
    counted = [i for share in shares for indices, valid in share for i in indices[:valid].tolist()]
    assert counted == list(range(size))
    assert max(int(indices.max()) for share in shares for indices, _ in share) < size


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_tokens", [1, 8, 40])
def test_examples_of_similar_length_are_measured_together(processes: int, batch_tokens: int) -> None:
    lengths = torch.tensor([[9, 1], [2, 2], [5, 5], [1, 1], [2, 1], [7, 3], [1, 2]])
    examples = Examples(7, lambda indices, generator: indices, lengths)
    recipe = Small(batch_tokens=batch_tokens)
    shares = [list(_shares(examples, recipe, rank, processes)) for rank in range(processes)]
    assert len({tuple(len(indices) for indices, _ in share) for share in shares}) == 1
    counted = [i for share in shares for indices, valid in share for i in indices[:valid].tolist()]
    assert sorted(counted) == list(range(7))
    for batches in zip(*shares, strict=True):
        together = torch.cat([indices for indices, _ in batches])
        tokens = len(together) * int(lengths[together].amax(dim=0).sum())
        assert tokens <= 4 * batch_tokens or len(together) == processes


def test_test_examples_may_have_a_score_of_their_own() -> None:
    found = task(lambda model, batch: {"eval_loss": batch}, test_score=lambda model, batch: {"eval_loss": 0 * batch})
    found = replace(found, test=Examples(7, lambda indices, generator: VALUES[indices]))
    with launched(Hardware(accelerator="cpu"), "32") as fabric:
        means = [evaluate(fabric, found.model, found, each, Small()) for each in (found.evaluation, found.test)]
    assert means == [{"eval_loss": 25 / 7}, {"eval_loss": 0.0}]


def test_small_is_measured_on_its_own_batches() -> None:
    recipe = Small()
    torch.manual_seed(0)
    found = recipe.task()
    one, other = measured(found, 30), measured(found, 30)
    assert one == other  # the same noise each time
