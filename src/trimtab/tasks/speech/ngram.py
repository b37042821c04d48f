"""A character n-gram with Witten-Bell smoothing, for decoding."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from trimtab.errors import CheckpointError

FILE = "ngram.json"
"""Under which name a task leaves its n-gram in the run folder."""
EDGE = "\n"
"""What stands before and after every text; no transcript holds it."""


@dataclass(frozen=True)
class NGram:
    """The probability of a character after those before it.

    Attributes:
        order: how many characters a count is of, the last one included.
        characters: all that can come; the end of the text can come beside them.
        counts: of what came after each history of 0 to order - 1 characters.
    """

    order: int
    characters: str
    counts: Mapping[str, Mapping[str, int]]
    _known: dict[tuple[str, str], float] = field(default_factory=dict, repr=False, compare=False)

    def log_probability(self, text: str, character: str) -> float:
        """Logarithm of the probability that a character, or `EDGE`, comes after a text, nats.

        Witten and Bell (IEEE Transactions on Information Theory, 1991, method C), interpolated: a history that was
        seen N times with D different characters after it gives D / (N + D) of its probability to the shorter history;
        the shortest gives it to all characters alike.
        """
        history = (EDGE + text)[-(self.order - 1) :] if self.order > 1 else ""
        key = (history, character)
        if key not in self._known:
            self._known[key] = math.log(self._probability(history, character))
        return self._known[key]

    def _probability(self, history: str, character: str) -> float:
        shorter = self._probability(history[1:], character) if history else 1 / (len(self.characters) + 1)
        seen = self.counts.get(history)
        if seen is None:
            return shorter
        total, different = sum(seen.values()), len(seen)
        return (seen.get(character, 0) + different * shorter) / (total + different)

    def to_text(self) -> str:
        """What `read_ngram` reads."""
        return json.dumps([self.order, self.characters, self.counts])


def count_ngrams(order: int, texts: Iterable[str], characters: str) -> NGram:
    """Learn an n-gram from texts of given characters."""
    counts: dict[str, Counter[str]] = {}
    for text in texts:
        whole = f"{EDGE}{text}{EDGE}"
        for end in range(1, len(whole)):
            for start in range(max(0, end - order + 1), end + 1):
                counts.setdefault(whole[start:end], Counter())[whole[end]] += 1
    return NGram(order, characters, counts)


def read_ngram(text: str) -> NGram:
    """Make an n-gram again from what `NGram.to_text` wrote.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        order, characters, counts = json.loads(text)
        return NGram(int(order), str(characters), dict(counts))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the run's {FILE} is damaged: {error}") from None
