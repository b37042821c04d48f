"""The labels of CTC: 0 is the blank, and every character of the training transcripts is one."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trimtab.errors import CheckpointError

BLANK = 0
FILE = "labels.json"
"""Under which name a task leaves its characters in the run folder."""


@dataclass(frozen=True)
class Labels:
    """Characters to labels and back.

    Attributes:
        characters: label i + 1 is character i.
    """

    characters: str

    @property
    def number(self) -> int:
        """How many labels there are, V, the blank among them."""
        return 1 + len(self.characters)

    def encode(self, text: str) -> list[int]:
        """The labels of a text; characters that are none are left out (`unknown` counts them)."""
        return [1 + i for i in map(self.characters.find, text) if i >= 0]

    def decode(self, labels: Iterable[int]) -> str:
        """The text of labels without blanks."""
        return "".join(self.characters[label - 1] for label in labels)

    def unknown(self, text: str) -> int:
        """How many characters of a text are no label."""
        return sum(character not in self.characters for character in text)

    def to_text(self) -> str:
        """What `read_labels` reads."""
        return json.dumps(self.characters)


def labels_of(texts: Sequence[str]) -> Labels:
    """The labels that texts need, in the order of their code points."""
    return Labels("".join(sorted(set().union(*texts))))


def read_labels(text: str) -> Labels:
    """Make labels again from what `Labels.to_text` wrote.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        characters = json.loads(text)
    except ValueError:
        characters = None
    if not isinstance(characters, str):
        raise CheckpointError(f"the run's {FILE} is damaged: expected one text of all characters")
    return Labels(characters)
