import jiwer
import numpy as np
import pytest

from trimtab.tasks.speech.metrics import edits, word_error_rate

WORDS = ["one", "two", "oh", "o", "three"]


def sentences(seed: int, count: int, least: int) -> list[str]:
    draw = np.random.RandomState(seed)
    return [" ".join(draw.choice(WORDS, draw.randint(least, 7))) for _ in range(count)]


def distance(a: list[str] | str, b: list[str] | str) -> int:
    """Levenshtein's, by its recursion."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        rows.append([i])
        for j, y in enumerate(b, 1):
            rows[i].append(min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (x != y)))
    return rows[-1][-1]


def test_sums_over_utterances_are_the_rates_of_jiwer() -> None:
    references, heard = sentences(0, 40, least=1), sentences(1, 40, least=0)
    each = [edits(*pair) for pair in zip(references, heard, strict=True)]
    words = sum(one.word_errors for one in each) / sum(one.words for one in each)
    characters = sum(one.character_errors for one in each) / sum(one.characters for one in each)
    assert words == jiwer.wer(references, heard) == word_error_rate(references, heard)
    assert characters == jiwer.cer(references, heard)


def test_edits_are_the_fewest() -> None:
    for reference, heard in zip(sentences(2, 30, least=1), sentences(3, 30, least=0), strict=True):
        found = edits(reference, heard)
        assert found.word_errors == distance(reference.split(), heard.split())
        assert found.character_errors == distance(reference, heard)
        assert (found.words, found.characters) == (len(reference.split()), len(reference))


def test_of_an_empty_reference_all_that_is_heard_is_in_error() -> None:
    assert edits("", "a bc") == (2, 0, 4, 0)
    assert edits("", "") == (0, 0, 0, 0)
    assert edits("a bc", "") == (2, 2, 4, 4)
    assert word_error_rate(["", "a"], ["b", "a"]) == 1.0
    assert word_error_rate([""], [""]) == 0.0
    assert word_error_rate([""], ["a"]) == pytest.approx(float("inf"))
