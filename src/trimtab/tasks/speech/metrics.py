"""Word and character error rates, by jiwer, as sums over utterances."""

from typing import NamedTuple


class Edits(NamedTuple):
    """What it takes to make a reference of a transcript, and what that is a rate of.

    Attributes:
        word_errors: words put in, left out or replaced.
        words: of the reference.
        character_errors: likewise of characters, spaces among them.
        characters: of the reference.
    """

    word_errors: int
    words: int
    character_errors: int
    characters: int


def edits(reference: str, heard: str) -> Edits:
    """Compare one transcript with its reference. Sums over utterances, divided, are the rates of all of them together.

    Args:
        reference: what was said; if nothing, all that was heard is in error.
        heard: what was transcribed.
    """
    import jiwer

    words = jiwer.process_words(reference, heard)
    characters = jiwer.process_characters(reference, heard)
    return Edits(
        words.substitutions + words.deletions + words.insertions,
        words.hits + words.substitutions + words.deletions,
        characters.substitutions + characters.deletions + characters.insertions,
        characters.hits + characters.substitutions + characters.deletions,
    )


def word_error_rate(references: list[str], heard: list[str]) -> float:
    """Errors over words of all utterances together; infinite for errors against no words at all."""
    each = [edits(*pair) for pair in zip(references, heard, strict=True)]
    errors, words = sum(one.word_errors for one in each), sum(one.words for one in each)
    return errors / words if words else float("inf") if errors else 0.0
