import math
from collections import Counter

import numpy as np
import pytest

from trimtab.tasks.language.ngram import count, log_probabilities, tune


def text(size: int, seed: int) -> np.ndarray:
    """Tokens 0 to 5 in which each depends on the two before it."""
    random = np.random.default_rng(seed)
    tokens = [0, 1]
    for _ in range(size - 2):
        tokens.append((tokens[-1] + 2 * tokens[-2]) % 5 if random.random() < 0.6 else int(random.integers(5)))
    return np.array(tokens, np.uint16)


def by_hand(train: list[int], history: list[int], token: int, vocab_size: int, discounts: list[float]) -> float:
    """Interpolated Kneser-Ney as the formula reads, with dicts."""
    order = len(discounts)

    def grams(length: int) -> list[tuple[int, ...]]:
        return [tuple(train[i : i + length]) for i in range(len(train) - length + 1)]

    def probability(h: tuple[int, ...]) -> float:
        length = len(h) + 1
        c = Counter(grams(length)) if length == order else Counter(gram[1:] for gram in set(grams(length + 1)))
        total = sum(value for gram, value in c.items() if gram[:-1] == h)
        types = sum(1 for gram in c if gram[:-1] == h)
        lower = probability(h[1:]) if h else 1 / vocab_size
        if total == 0:
            return lower
        d = discounts[length - 1]
        return (max(c[(*h, token)] - d, 0) + d * types * lower) / total

    return probability(tuple(history[-(order - 1) :] if order > 1 else ()))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_are_those_of_the_formula(order: int) -> None:
    train, held_out = text(60, 1), np.array([5, 0, 1, 2, 4, 3, 5, 5, 0, 3, 1, 0], np.uint16)  # 5 is never learned
    discounts = [0.3, 0.9, 0.6, 0.75][:order]
    found = log_probabilities(count(train, 7, order), held_out, discounts)
    tokens = held_out.tolist()
    for place in range(max(1, order - 1), len(tokens)):  # before that there are fewer tokens than a history has
        expected = by_hand(train.tolist(), tokens[:place], tokens[place], 7, discounts)
        assert found[place - 1] == pytest.approx(math.log(expected), rel=1e-12), place


@pytest.mark.parametrize("history", [[0, 1], [3, 3], [5, 5], [2]])
def test_probabilities_of_all_tokens_sum_to_one(history: list[int]) -> None:
    ngrams = count(text(200, 2), 8, 3)
    each = [log_probabilities(ngrams, np.array([*history, token]), [0.5, 0.7, 0.8])[-1] for token in range(8)]
    assert np.exp(each).sum() == pytest.approx(1, rel=1e-12)


def test_tuned_discounts_are_no_worse_than_others() -> None:
    ngrams, held_out = count(text(400, 3), 5, 3), text(300, 4)
    tuned = tune(ngrams, held_out)
    best = log_probabilities(ngrams, held_out, tuned).sum()
    for place in range(3):
        for step in (-0.05, 0.05):
            other = list(tuned)
            other[place] = min(0.95, max(0.05, other[place] + step))
            assert log_probabilities(ngrams, held_out, other).sum() <= best


def test_a_longer_history_tells_more_of_a_text_made_from_two_tokens() -> None:
    train, held_out = text(5000, 5), text(2000, 6)
    losses = []
    for order in (1, 2, 3):
        ngrams = count(train, 5, order)
        losses.append(-log_probabilities(ngrams, held_out, tune(ngrams, held_out)).mean())
    entropy = -(0.68 * math.log(0.68) + 0.32 * math.log(0.08))  # of how the text is made
    assert losses[0] == pytest.approx(math.log(5), abs=0.02)
    assert losses[2] == pytest.approx(entropy, abs=0.05)
    assert losses[1] > losses[2] + 0.2
