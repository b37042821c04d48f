import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from trimtab.errors import CheckpointError, RecipeError
from trimtab.tasks.speech.ctc import best_path, ctc_loss, frames_needed
from trimtab.tasks.speech.decode import Beam, prefix_beam_search, transcribe
from trimtab.tasks.speech.labels import Labels, labels_of, read_labels
from trimtab.tasks.speech.ngram import EDGE, NGram, count_ngrams, read_ngram

LABELS = Labels("ab ")
TEXTS = ["ab a", "abba", "b a b", "a"]


def logits(frames: int, seed: int, labels: int = 4, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(frames, labels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label != 0)


def all_texts(rows: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The probability of every sequence of labels: over all alignments, one by one."""
    probabilities = rows.softmax(dim=-1).numpy()
    totals: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(rows.shape[1]), repeat=len(rows)):
        totals[collapsed(path)] += math.prod(probabilities[frame, label] for frame, label in enumerate(path))
    return totals


def test_the_loss_is_that_of_all_alignments() -> None:
    rows = torch.stack([logits(5, seed) for seed in range(3)])
    lengths = torch.tensor([5, 4, 3])
    targets = torch.tensor([[1, 1, 2], [3, 0, 0], [9, 9, 9]])  # the third is empty, whatever pads it
    found = ctc_loss(rows, lengths, targets, torch.tensor([3, 1, 0]))
    assert found.dtype == torch.float32
    for i, target in enumerate([(1, 1, 2), (3,), ()]):
        expected = -math.log(all_texts(rows[i, : lengths[i]])[target])
        assert found[i].item() == pytest.approx(expected, rel=1e-5)  # float32


@pytest.mark.parametrize("target", [(1,), (1, 1), (1, 2, 1), (1, 1, 1), (1, 1, 2, 2), ()])
def test_a_loss_is_finite_from_so_many_frames_on(target: tuple[int, ...]) -> None:
    needed = frames_needed(target)
    for frames in range(1, 7):
        found = ctc_loss(
            logits(frames, 0)[None], torch.tensor([frames]), torch.tensor([[*target, 0]]), torch.tensor([len(target)])
        )
        assert found.isfinite().item() == (frames >= needed) == (all_texts(logits(frames, 0))[target] > 0)


def test_the_best_path_is_merged_and_without_blanks() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 3, 3]
    rows = torch.nn.functional.one_hot(torch.tensor([path, path]), 4).double() * 5
    assert best_path(rows, torch.tensor([9, 5])) == [[1, 1, 2, 3], [1, 1]]
    assert best_path(rows * float("nan"), torch.tensor([9, 5])) == [[], []]
    rows[0, 6] = float("nan")  # beyond the second utterance's length it does not matter
    rows[1, 6] = float("nan")
    assert best_path(rows, torch.tensor([9, 5])) == [[], [1, 1]]


def language_score(labels: tuple[int, ...], beam: Beam, ngram: NGram | None) -> float:
    text = LABELS.decode(labels)
    score = beam.bonus * len(text)
    if ngram is not None:
        score += beam.ngram_weight * sum(
            ngram.log_probability(text[:i], character) for i, character in enumerate([*text, EDGE])
        )
    return score


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_wide_beam_finds_the_best_of_all_texts(seed: int, order: int) -> None:
    rows = logits(6, seed)
    ngram = count_ngrams(order, TEXTS, LABELS.characters) if order else None
    beam = Beam(width=5000, ngram=order, ngram_weight=0.7, bonus=0.3, floor=-1e9)
    totals = all_texts(rows)
    scores = {text: math.log(value) + language_score(text, beam, ngram) for text, value in totals.items()}
    found = tuple(prefix_beam_search(rows.log_softmax(dim=-1).numpy(), LABELS, beam, ngram))
    assert scores[found] == pytest.approx(max(scores.values()), abs=1e-9)


def test_a_search_finds_what_the_best_path_misses() -> None:
    # "a" has most of the probability, in many alignments; the likeliest single one says nothing
    rows = torch.tensor([[0.6, 0.4, 1e-9, 1e-9]] * 2).log()
    lengths = torch.tensor([2])
    assert transcribe(rows[None], lengths, LABELS, Beam()) == [""]
    assert transcribe(rows[None], lengths, LABELS, Beam(width=4)) == ["a"]


def test_an_ngram_decides_between_what_sounds_alike() -> None:
    labels = Labels("abc")
    ngram = count_ngrams(3, ["aba"] * 20 + ["c"], labels.characters)
    path = torch.tensor([[0, 5, 0, 0], [5, 0, 0, 0], [0, 0, 4, 4.1], [5, 0, 0, 0], [0, 5, 0, 0]]).double()
    lengths = torch.tensor([5])
    assert transcribe(path[None], lengths, labels, Beam()) == ["aca"]
    assert transcribe(path[None], lengths, labels, Beam(width=8)) == ["aca"]
    assert transcribe(path[None], lengths, labels, Beam(width=8, ngram=3), ngram) == ["aba"]


def test_a_search_says_nothing_of_logits_that_are_not_finite_and_looks_at_its_own_frames_only() -> None:
    rows = torch.stack([logits(6, 0), logits(6, 1)])
    rows[1, 5] = float("nan")
    beam = Beam(width=8)
    alone = transcribe(rows[1:, :4], torch.tensor([4]), LABELS, beam)
    assert transcribe(rows, torch.tensor([6, 4]), LABELS, beam)[1] == alone[0]
    assert transcribe(rows, torch.tensor([6, 6]), LABELS, beam)[1] == ""


def test_an_ngram_gives_probabilities() -> None:
    for order in (1, 2, 4):
        ngram = count_ngrams(order, TEXTS, LABELS.characters)
        for before in ("", "a", "ab", "abba b", " ", "zz"):
            total = sum(math.exp(ngram.log_probability(before, each)) for each in [*LABELS.characters, EDGE])
            assert total == pytest.approx(1, abs=1e-12)


def test_an_ngram_is_witten_bell_by_hand() -> None:
    ngram = count_ngrams(2, ["ab", "aa"], "ab")
    # after an edge, a: twice; after a: b, a, edge; after b: edge. All: a 3 times, b once, edge twice
    uniform = 1 / 3
    single = {"a": (3 + 3 * uniform) / 9, "b": (1 + 3 * uniform) / 9, EDGE: (2 + 3 * uniform) / 9}
    after_edge = (2 + 1 * single["a"]) / 3
    after_a = (1 + 3 * single["b"]) / 6
    assert math.exp(ngram.log_probability("", "a")) == pytest.approx(after_edge)
    assert math.exp(ngram.log_probability("ba", "b")) == pytest.approx(after_a)
    assert math.exp(ngram.log_probability("a", "b")) == pytest.approx(after_a)


def test_an_ngram_and_labels_are_read_back() -> None:
    ngram = count_ngrams(3, TEXTS, LABELS.characters)
    again = read_ngram(ngram.to_text())
    assert again == ngram
    assert again.log_probability("ab", "b") == ngram.log_probability("ab", "b")
    assert read_labels(LABELS.to_text()) == LABELS
    for damaged in ("{", "[1]", "3"):
        with pytest.raises(CheckpointError, match=r"ngram\.json is damaged"):
            read_ngram(damaged)
        with pytest.raises(CheckpointError, match=r"labels\.json is damaged"):
            read_labels(damaged)


def test_labels_are_the_characters_and_unknown_ones_are_counted() -> None:
    labels = labels_of(["ba", "c a"])
    assert labels == Labels(" abc")
    assert labels.number == 5
    assert labels.encode("cab") == [4, 2, 3]
    assert labels.decode(labels.encode("a b")) == "a b"
    assert labels.encode("aXb") == [2, 3]
    assert labels.unknown("aXbYY") == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, r"beam\.width must be at least 1"),
        ({"ngram": 3}, r"set beam\.width to 8"),
        ({"width": 4, "ngram": -1}, r"beam\.ngram must be at least 0"),
        ({"width": 4, "ngram_weight": -1.0}, r"beam\.ngram_weight"),
        ({"floor": 0.0}, r"beam\.floor must be below 0"),
    ],
)
def test_a_wrong_beam_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Beam(**changes)


def test_the_search_is_the_same_each_time_also_among_equals() -> None:
    rows = np.log(np.full((4, 4), 0.25))
    assert prefix_beam_search(rows, LABELS, Beam(width=3)) == prefix_beam_search(rows, LABELS, Beam(width=3))
