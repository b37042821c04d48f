"""Heads that have no number: they do not hide those of the others, and broken ones are not averaged away."""

import json
import math

import pytest
import torch
from torch import nn

from trimtab.watch import Watch
from trimtab.watch.alarms import Head, Reading
from trimtab.watch.reduce import Sight, combine
from trimtab.watch.signals import head_stats, merge


class Weights(nn.Module):
    """Attention written by hand that returns its weights; the logits stay inside."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (x @ x.mT).softmax(-1)
        return weights @ x, weights


class Both(nn.Module):
    """One attention of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.shown, self.hidden = nn.Linear(4, 4), Weights()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.hidden(x)
        return nn.functional.scaled_dot_product_attention(self.shown(x), x, x) + y


def test_a_head_that_shows_its_weights_only_leaves_the_others_their_logits(tmp_path) -> None:
    model = Both()
    with Watch(model, tmp_path, every=1) as watch:
        model(torch.randn(3, 2, 5, 4))
        watch.step(1.0)
    shown = [row for row in watch.coverage() if row.seen == "exact"]
    assert len(shown) == 2
    (line,) = [json.loads(text) for text in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line[name]) for name in ("max_logit", "logit_norm", "entropy_bound", "entropy_mean"))


def test_no_choice_in_one_micro_batch_or_process_leaves_the_number_of_the_other() -> None:
    alone, several = (head_stats(torch.randn(2, 1, 1, 4), torch.randn(2, 1, keys, 4)) for keys in (1, 6))
    assert alone.normalized.isnan().all()
    assert merge([alone, several]).normalized.item() == several.normalized.item()
    one, two = (Reading(*(value.item() for value in stats)) for stats in (alone, several))
    head = Head("attention", 0)
    both = combine([Sight({}, {head: one}), Sight({}, {head: two})]).readings[head]
    assert both.normalized == two.normalized
    assert both.entropy == pytest.approx((one.entropy + two.entropy) / 2)


def test_what_is_broken_in_one_micro_batch_stays_broken() -> None:
    query = torch.full((2, 1, 3, 4), math.nan)
    broken, healthy = head_stats(query, query), head_stats(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4))
    assert all(numbers.isnan().all() for numbers in merge([healthy, broken]))


def test_a_head_without_any_number_is_absent_from_the_line(tmp_path) -> None:
    model = nn.Linear(2, 2)
    with Watch(model, tmp_path, every=1) as watch:
        model(torch.randn(1, 2))
        watch.step(1.0)
    assert not {"entropy_mean", "max_logit", "logit_norm"} & set(watch.last)
