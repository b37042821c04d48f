"""What a run trains: a model, its examples, a loss and a score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import RecipeError

Batch = Any
"""Tensors in any nest of tuples, lists and dicts; the first dimension of each is the examples'."""


@dataclass(frozen=True)
class Examples:
    """Some examples, and how to make a batch of them.

    Attributes:
        size: how many there are.
        batch: from the indices of some, (B,) int64, and a generator for anything random, to the batch, on the CPU.
            The same indices and generator give the same batch.
        lengths: of examples that are sequences, tokens in each, (size, K) int64; K is 2 for pairs of sentences. With
            `Recipe.batch_tokens` those of similar length come together.
    """

    size: int
    batch: Callable[[Tensor, torch.Generator], Batch]
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise RecipeError("a task needs at least one example, this one has none")
        if self.lengths is not None and (self.lengths.ndim != 2 or len(self.lengths) != self.size):
            raise RecipeError(
                f"lengths must be of shape ({self.size}, K), a row for each example; got {tuple(self.lengths.shape)}"
            )


def same(means: dict[str, float], size: int) -> dict[str, float]:
    """The means themselves."""
    return means


@dataclass(frozen=True)
class Task:
    """What a run trains.

    Attributes:
        model: freshly drawn from torch's global random number generator, in plain layers.
        train: the examples to learn from.
        loss: from the model and a batch to the mean loss of its examples, (). Called in training mode.
        evaluation: examples that decide which weights are best; None measures nothing while training.
        test: examples that are measured once, at the end, with the weights that the run keeps.
        score: from the model and a batch to numbers by name, one for each example, each (B,). Called in eval mode,
            without gradients. Name none of them "loss", which is that of training.
        summarize: from the means of the scores over all examples, and how many these are, to the metrics: the means
            themselves, or a ratio of two for a metric of the whole set.
        metric: the name of the metric that decides.
        higher_is_better: whether more of it is better.
        prepare: for a score that needs more than its batch, such as a classifier of the model's features. From the
            model to anything, which `score` gets as a third argument. Called before each measurement, in all
            processes, in eval mode, without gradients.
        test_score: as `score`, for the test examples, where it may cost more, such as decoding by beam search; None
            for the same.
        weight: from a batch to what its loss is a mean over, such as its tokens, (). Micro-batches and processes then
            count by it, and the step is that of the mean over all of them. None counts them alike.
        facts: about the examples, plain values for run.json.
        files: more for the run folder, name to text: what a trained model needs to be used, such as its vocabulary.
    """

    model: nn.Module
    train: Examples
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluation: Examples | None = None
    test: Examples | None = None
    score: Callable[..., dict[str, Tensor]] | None = None
    summarize: Callable[[dict[str, float], int], dict[str, float]] = same
    metric: str = "eval_loss"
    higher_is_better: bool = False
    prepare: Callable[[nn.Module], Any] | None = None
    test_score: Callable[..., dict[str, Tensor]] | None = None
    weight: Callable[[Batch], Tensor] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.score is None and not (self.evaluation is None and self.test is None):
            raise RecipeError("a task with evaluation or test examples needs a score for them")
