"""The baseline of language models: n-grams, a trigram by default, by interpolated Kneser-Ney smoothing.

Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1999, section 2.7, with one discount
an order. For a history h, h' without its first token, and the token w:

    p(w | h) = (max(c(h w) - d, 0) + d · types(h) · p(w | h')) / c(h)

c counts in the text for the longest histories, and for shorter ones how many different tokens come before `h w`; c(h)
is its sum over w, types(h) for how many w it is positive. Where c(h) is 0, p(w | h) is p(w | h'); below the shortest
history all tokens of the vocabulary are alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trimtab.tasks.language.streams import Numbers, Streams

_Whole = NDArray[np.int64]
_Real = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """The n-grams of one length, each with a number: its place in `keys`.

    Attributes:
        keys: (G,), ascending: the number of the history, times V, plus the last token.
        counts: c(h w), (G,).
        totals: c(h) by the number of the history, which is that of an n-gram one shorter.
        types: types(h), likewise.
    """

    keys: _Whole
    counts: _Whole
    totals: _Whole
    types: _Whole


@dataclass(frozen=True)
class NGrams:
    """What a text has been counted to.

    Attributes:
        vocab_size: V.
        levels: unigrams first.
    """

    vocab_size: int
    levels: tuple[Level, ...]


def count(tokens: Numbers, vocab_size: int, order: int = 3) -> NGrams:
    """Count a text's n-grams.

    Args:
        tokens: (N,), from 0 to `vocab_size` - 1.
        vocab_size: V.
        order: of the longest n-grams; 3 for a trigram.
    """
    tokens = tokens.astype(np.int64)
    numbers, keys, firsts = [np.zeros_like(tokens)], [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    for length in range(1, order + 1):
        found = _keys(numbers[-1], tokens, vocab_size, length)
        there = np.flatnonzero(found >= 0)
        unique, first, number = np.unique(found[there], return_index=True, return_inverse=True)
        numbers.append(np.full_like(tokens, -1))
        numbers[-1][there] = number
        keys.append(unique)
        firsts.append(there[first])
    counts = [
        np.bincount(numbers[length][first], minlength=len(keys[length])) for length, first in enumerate(firsts[1:])
    ]
    counts = [*counts[1:], np.bincount(numbers[-1][numbers[-1] >= 0])]
    levels = []
    for each, (shorter, longer) in zip(counts, pairwise(keys), strict=True):
        histories = longer // vocab_size
        totals = np.bincount(histories, each, minlength=len(shorter)).astype(np.int64)
        levels.append(Level(longer, each, totals, np.bincount(histories[each > 0], minlength=len(shorter))))
    return NGrams(vocab_size, tuple(levels))


def log_probabilities(ngrams: NGrams, tokens: Numbers, discounts: Sequence[float]) -> _Real:
    """The logarithm of the probability of each token but the first, after those before it, nats.

    Args:
        ngrams: of the text that was learned from.
        tokens: (N + 1,), of any text.
        discounts: d from 0 to 1 for each length, unigrams first.

    Returns:
        (N,).
    """
    return _log_probabilities(_counts_in(ngrams, tokens), ngrams.vocab_size, discounts)


def tune(ngrams: NGrams, tokens: Numbers) -> list[float]:
    """The discounts, multiples of 0.05, by which a held-out text (N + 1,) is likeliest, changed one at a time."""
    counts = _counts_in(ngrams, tokens)
    discounts = [0.75] * len(ngrams.levels)
    for _ in range(3):
        for place in range(len(discounts)):
            tried = [[*discounts[:place], d / 20, *discounts[place + 1 :]] for d in range(1, 20)]
            discounts = max(tried, key=lambda each: _log_probabilities(counts, ngrams.vocab_size, each).sum())
    return discounts


def nats_per_token(streams: Streams, order: int = 3) -> dict[str, float]:
    """Of an n-gram model of the training text, tuned on the validation text: nats a token, by part."""
    ngrams = count(streams.train.tokens, streams.tokenizer.get_vocab_size(), order)
    discounts = tune(ngrams, streams.validation.tokens)
    parts = {"validation": streams.validation, "test": streams.test}
    return {
        name: -float(log_probabilities(ngrams, part.tokens, discounts).mean())
        for name, part in parts.items()
        if part is not None
    }


def _keys(histories: _Whole, tokens: _Whole, vocab_size: int, length: int) -> _Whole:
    """The key of the n-gram that ends at each place, from the numbers of those one shorter; -1 if there is none."""
    before = np.zeros_like(tokens) if length == 1 else np.concatenate([[-1], histories[:-1]])
    return np.where(before >= 0, before * vocab_size + tokens, -1)


def _counts_in(ngrams: NGrams, tokens: Numbers) -> list[tuple[_Whole, _Whole, _Whole]]:
    """For each length c(h w), c(h) and types(h) at every place of a text but the first."""
    tokens = tokens.astype(np.int64)
    numbers, found = np.zeros_like(tokens), []
    for length, level in enumerate(ngrams.levels, 1):
        keys = _keys(numbers, tokens, ngrams.vocab_size, length)
        history = np.where(keys >= 0, keys // ngrams.vocab_size, 0)
        place = np.searchsorted(level.keys, keys).clip(max=len(level.keys) - 1)
        seen = level.keys[place] == keys
        known = (keys >= 0).astype(np.int64)
        here = np.where(seen, level.counts[place], 0), known * level.totals[history], known * level.types[history]
        found.append((here[0][1:], here[1][1:], here[2][1:]))
        numbers = np.where(seen, place, -1)
    return found


def _log_probabilities(
    counts: Sequence[tuple[_Whole, _Whole, _Whole]], vocab_size: int, discounts: Sequence[float]
) -> _Real:
    probability = np.full(len(counts[0][0]), 1 / vocab_size)
    for (of_gram, of_history, types), discount in zip(counts, discounts, strict=True):
        smoothed = np.maximum(of_gram - discount, 0) + discount * types * probability
        probability = np.where(of_history > 0, smoothed / np.maximum(of_history, 1), probability)
    return np.log(probability)
