"""`LanguageRecipe`: a GPT that tells the next token of a text, as a typed, frozen config."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.models.gpt import GPT, GPTConfig
from trimtab.tasks.language.streams import Stream, Streams, num_words, streams_of
from trimtab.tasks.language.texts import find_texts
from trimtab.tasks.language.windows import evaluation_windows, training_windows
from trimtab.tasks.notices import warn
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Examples, Task
from trimtab.tasks.text.tokens import FILE, LEAST_BYTE_PAIRS, Kind

_MANY_UNKNOWN = 0.1  # of the tokens of a part


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe(Recipe):
    """A GPT that tells the next token, by cross-entropy.

    Metrics, of the validation text while training and of the test text at the end, every token of them once:

    - "eval_loss": nats a token.
    - "perplexity": ``exp(eval_loss)``, per token: it compares models with the same tokens only.
    - "word_perplexity", which decides: ``exp(nats of the whole text / its words)``. Words are separated by white space,
      and the end of a line is one, as in the counts of WikiText; so models with different tokens compare. Where words
      are the tokens, it is the perplexity. Tokens of what the vocabulary lacks count like others, which makes a small
      vocabulary look good; how many there are is in run.json.

    The vocabulary is learned from the training text.

    Attributes:
        data: name or path of the text, see `trimtab.tasks.language.texts.find_texts`.
        tokens: "characters"; "words", separated by white space, with a token for the end of each line; or "bpe",
            byte-pair encoding.
        model: the GPT; its `vocab_size` is the most tokens there may be, and needed for "bpe".
        stride: tokens that count in a window of evaluation, see `evaluation_windows`; None for all, `model.context`.
        evaluation_tokens: tokens of the validation text that are measured, from its start; None for all. The test text
            is measured as a whole.

    Raises:
        RecipeError: a field is out of range, or has the wrong type.
    """

    data: str
    tokens: Kind
    model: GPTConfig
    stride: int | None = None
    evaluation_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride is not None and not 1 <= self.stride <= self.model.context:
            raise RecipeError(f"stride must be from 1 to model.context, {self.model.context}; got {self.stride}")
        if self.evaluation_tokens is not None and self.evaluation_tokens < self.model.context:
            raise RecipeError(
                f"evaluation_tokens must be at least model.context, {self.model.context}; got {self.evaluation_tokens}"
            )
        if self.tokens == "bpe" and (self.model.vocab_size or 0) < LEAST_BYTE_PAIRS:
            raise RecipeError(
                f"a vocabulary of byte pairs needs a size, of at least {LEAST_BYTE_PAIRS}; got "
                f"{self.model.vocab_size}: --model.vocab-size 4096"
            )

    def streams(self) -> Streams:
        """Make the texts' tokens, or find them made.

        Raises:
            DataError: the text cannot be loaded.
        """
        return streams_of(find_texts(self.data), self.tokens, self.model.vocab_size)

    def make_model(self, vocab_size: int) -> GPT:
        """Draw the model for a vocabulary of so many tokens."""
        return GPT(replace(self.model, vocab_size=vocab_size))

    def task(self) -> Task:
        """Load the text and draw the model.

        Raises:
            DataError: the text cannot be loaded, or is shorter than a context.
        """
        streams = self.streams()
        validation = streams.validation
        if self.evaluation_tokens is not None and self.evaluation_tokens < validation.size:
            start = validation.tokens[: self.evaluation_tokens + 1]
            validation = replace(validation, tokens=start, words=num_words(streams.tokenizer, self.tokens, start[1:]))

        def windows(stream: Stream) -> Examples:
            return evaluation_windows(stream, self.model.context, self.stride or self.model.context)

        return Task(
            model=self.make_model(streams.tokenizer.get_vocab_size()),
            train=training_windows(streams.train, self.model.context),
            loss=loss,
            evaluation=windows(validation),
            test=None if streams.test is None else windows(streams.test),
            score=score,
            summarize=perplexities,
            metric="word_perplexity",
            facts=_facts(streams),
            files={FILE: streams.tokenizer.to_str()},
        )


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, nats: tokens (B, T + 1) -> ()."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def score(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Of each window: nats of the tokens that count in it, how many these are, and its share of the text's words."""
    tokens, counted, words = batch
    logits = model(tokens[:, :-1]).flatten(0, 1)  # (B, T, V) -> (B T, V)
    nats = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view_as(counted)  # (B, T)
    return {"nats": nats.masked_fill(~counted, 0).sum(dim=1), "tokens": counted.sum(dim=1), "words": words}


def perplexities(means: dict[str, float], size: int) -> dict[str, float]:
    """The metrics, from the means over the windows of what `score` tells of each."""
    per_token, per_word = means["nats"] / means["tokens"], means["nats"] / means["words"]
    return {"eval_loss": per_token, "perplexity": _exp(per_token), "word_perplexity": _exp(per_word)}


def _exp(value: float) -> float:
    return math.inf if value > 709 else math.exp(value)  # of a run that diverges


def _facts(streams: Streams) -> dict[str, Any]:
    parts = {"train": streams.train, "validation": streams.validation, "test": streams.test}
    facts: dict[str, Any] = {"vocab_size": streams.tokenizer.get_vocab_size()}
    for name, part in parts.items():
        if part is not None:
            facts[name] = {"tokens": part.size, "words": part.words, "unknown_tokens": part.unknown}
            if part.unknown > _MANY_UNKNOWN * part.size:
                warn(
                    f"{name}: {part.unknown:,} of {part.size:,} tokens are not in the vocabulary, and count as <unk>: "
                    "the perplexity is one of guessing <unk>"
                )
    return facts
