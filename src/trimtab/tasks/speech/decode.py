"""From logits to text: the best path, or prefix beam search with a character n-gram. Both are deterministic."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trimtab.errors import RecipeError
from trimtab.tasks.speech.ctc import best_path
from trimtab.tasks.speech.labels import BLANK, Labels
from trimtab.tasks.speech.ngram import EDGE, NGram

Prefix = tuple[int, ...]
Alignments = tuple[float, float]
"""Of a prefix, over all alignments that end in a blank, and that end in its last label: log of their probability."""

_NEVER = -math.inf


@dataclass(frozen=True)
class Beam:
    """How a beam search is done.

    Attributes:
        width: texts that are kept after each frame; 1 takes the best path instead, without search.
        ngram: characters of the n-gram that is learned from the training transcripts; 0 for none.
        ngram_weight: factor on the n-gram's logarithms.
        bonus: for every character, nats: an n-gram alone would keep texts short.
        floor: labels whose logarithm of probability lies below this in a frame do not begin there, nats.

    Raises:
        RecipeError: a field is out of range, or they do not fit together.
    """

    width: int = 1
    ngram: int = 0
    ngram_weight: float = 0.5
    bonus: float = 0.0
    floor: float = -10.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise RecipeError(f"beam.width must be at least 1, got {self.width}")
        if self.ngram < 0:
            raise RecipeError(f"beam.ngram must be at least 0, got {self.ngram}")
        if self.ngram and self.width == 1:
            raise RecipeError("beam.ngram is for a search: set beam.width to 8 or more")
        if not (0 <= self.ngram_weight < math.inf and math.isfinite(self.bonus)):
            raise RecipeError(
                f"beam.ngram_weight must be at least 0 and beam.bonus a number, got {self.ngram_weight}, {self.bonus}"
            )
        if not self.floor < 0:
            raise RecipeError(f"beam.floor must be below 0, got {self.floor}")


def transcribe(logits: Tensor, lengths: Tensor, labels: Labels, beam: Beam, ngram: NGram | None = None) -> list[str]:
    """The text of each utterance.

    Args:
        logits: (B, L, V). An utterance with a logit that is not finite says nothing.
        lengths: (B,), frames of each utterance.
        labels: what they are logits of.
        beam: how to search.
        ngram: with its weight in `beam`; None for none.
    """
    if beam.width == 1:
        found = best_path(logits, lengths)
    else:
        rows = logits.double().log_softmax(dim=-1).cpu().numpy()
        found = [
            prefix_beam_search(row[:length], labels, beam, ngram) if np.isfinite(row[:length]).all() else []
            for row, length in zip(rows, lengths.tolist(), strict=True)
        ]
    return [labels.decode(each) for each in found]


def prefix_beam_search(
    log_probabilities: np.ndarray, labels: Labels, beam: Beam, ngram: NGram | None = None
) -> list[int]:
    """The labels that are most probable over all their alignments, as far as a beam sees.

    Hannun et al., "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent DNNs",
    arXiv 1408.2873, algorithm 1. The score of a text is the logarithm of its probability, plus for each of its
    characters the weighted logarithm of the n-gram's and the bonus, plus the n-gram's of its end.

    Args:
        log_probabilities: (L, V), of each label in each frame.
        labels: what they are of.
        beam: width, weights and floor.
        ngram: None for none.
    """
    added = _language_score(labels, beam, ngram)
    language: dict[Prefix, float] = {(): 0.0}
    kept: dict[Prefix, Alignments] = {(): (0.0, _NEVER)}
    for frame in log_probabilities.tolist():
        begins = [label for label, value in enumerate(frame) if label != BLANK and value >= beam.floor]
        new: dict[Prefix, Alignments] = {}
        for prefix, (in_blank, in_label) in kept.items():
            either, last = _log_add(in_blank, in_label), prefix[-1] if prefix else BLANK
            _put(new, prefix, either + frame[BLANK], in_label + frame[last])
            for label in begins:
                longer = (*prefix, label)
                if longer not in language:
                    language[longer] = language[prefix] + added(prefix, label)
                # the same label again is a new one only after a blank
                _put(new, longer, _NEVER, (in_blank if label == last else either) + frame[label])
        kept = {prefix: new[prefix] for prefix in _best(new, language, beam.width)}
        language = {prefix: language[prefix] for prefix in kept}
    ended = {prefix: language[prefix] + added(prefix, None) for prefix in kept}
    return list(_best(kept, ended, 1)[0])


def _put(prefixes: dict[Prefix, Alignments], prefix: Prefix, in_blank: float, in_label: float) -> None:
    """Add alignments to those that a prefix has already."""
    old = prefixes.get(prefix, (_NEVER, _NEVER))
    prefixes[prefix] = (_log_add(old[0], in_blank), _log_add(old[1], in_label))


def _best(prefixes: Mapping[Prefix, Alignments], language: Mapping[Prefix, float], width: int) -> list[Prefix]:
    """The prefixes of the highest scores, best first; of equal ones the smaller labels first."""
    return sorted(prefixes, key=lambda prefix: (-_log_add(*prefixes[prefix]) - language[prefix], prefix))[:width]


def _language_score(labels: Labels, beam: Beam, ngram: NGram | None) -> Callable[[Prefix, int | None], float]:
    """What a label, or the end (None), adds to the score of a prefix."""

    def added(prefix: Prefix, label: int | None) -> float:
        score = 0.0 if label is None else beam.bonus
        if ngram is None:
            return score
        before = labels.decode(prefix[-ngram.order :])  # long enough to hide the edge before a longer text
        character = EDGE if label is None else labels.decode([label])
        return score + beam.ngram_weight * ngram.log_probability(before, character)

    return added


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == _NEVER else a + math.log1p(math.exp(b - a))
