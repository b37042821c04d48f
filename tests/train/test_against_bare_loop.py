"""In one process the engine does, bit for bit, what one would write by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_recipes import Small, assert_same, by_hand, examples, lines, scores, trained
from safetensors.torch import load_file
from torch import nn

from trimtab.train import train
from trimtab.train.checkpoints import newest_checkpoint


def cosine(step: int) -> float:
    return step / 3 if step <= 3 else (1 + math.cos(math.pi * (step - 3) / 9)) / 2


def stairs(step: int) -> float:
    return step / 3 if step <= 3 else 0.5 ** ((step - 4) // 2)


@pytest.mark.parametrize(
    ("recipe", "factor"),
    [
        (Small(), lambda step: 1.0),
        (Small(seed=2**62, weight_decay=0.1, watch=True), lambda step: 1.0),
        (Small(clip=0.1), lambda step: 1.0),
        (Small(accumulate=4), lambda step: 1.0),
        (Small(schedule="cosine", warmup_steps=3), cosine),
        (Small(schedule="step", step_every=2, step_factor=0.5, warmup_steps=3, accumulate=2, clip=1.0), stairs),
    ],
    ids=["plain", "decay-watched", "clip", "accumulate", "cosine", "all"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_trains_as_by_hand(recipe: Small, factor: Callable[[int], float], tmp_path: Path) -> None:
    train(recipe, tmp_path)
    model, _ = by_hand(recipe, factor)
    assert_same(trained(recipe, tmp_path), model.state_dict())
    assert [line["lr"][0] for line in lines(tmp_path)] == pytest.approx(
        [recipe.lr * factor(step) for step in (1, 4, 8, 12)], rel=1e-12
    )


def test_the_average_is_that_by_hand_and_is_what_is_evaluated(tmp_path: Path) -> None:
    recipe = Small(ema=0.8)
    result = train(recipe, tmp_path)
    model, average = by_hand(recipe)
    assert_same(trained(recipe, tmp_path), model.state_dict())  # training itself does not know of it
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    named = {name: kept for (name, _), kept in zip(model.named_parameters(), average, strict=True)}
    assert_same(load_file(newest / "average.safetensors"), named)
    model.load_state_dict(named)
    model.eval()
    task = replace(recipe.task(), model=model)
    assert task.test is not None
    # one batch, and the generator's noise: 1e-6 for the order of the sum
    generator = torch.Generator().manual_seed(_evaluation_seed(recipe))
    expected = scores(model, task.test.batch(torch.arange(20), generator))["eval_loss"].double().mean()
    assert result.test["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


def _evaluation_seed(recipe: Small) -> int:
    from trimtab.train.order import derived_seed

    return derived_seed("evaluation", recipe.seed, 0)


def test_micro_batches_make_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    plain = Small(optimizer="sgd", dropout=0.0, steps=6)
    train(plain, tmp_path / "whole")
    train(replace(plain, accumulate=4), tmp_path / "parts")
    parts = trained(plain, tmp_path / "parts")
    for name, tensor in trained(plain, tmp_path / "whole").items():
        # the same sums in another order, in float32, over six steps
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6)


def test_parameters_that_are_frozen_or_unused_do_no_harm(tmp_path: Path) -> None:
    class Partly(Small):
        def task(self) -> object:
            task = super().task()
            task.model[0].weight.requires_grad_(False)
            task.model.unused = nn.Linear(2, 2)
            task.model.forward = lambda x: task.model[4](task.model[2](task.model[1](task.model[0](x))))
            return task

    recipe = Partly(clip=0.5, ema=0.9)
    torch.manual_seed(0)
    before = recipe.task().model.state_dict()
    train(recipe, tmp_path)
    after = trained(recipe, tmp_path)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert torch.equal(after["unused.weight"], before["unused.weight"])
    assert not torch.equal(after["4.weight"], before["4.weight"])


def test_helpers_are_not_the_same_examples() -> None:
    first, second = (examples(4, seed).batch(torch.arange(4), torch.Generator())[1] for seed in (1, 2))
    assert not torch.equal(first, second)
