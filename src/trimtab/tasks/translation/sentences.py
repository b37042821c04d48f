"""Sentences as token numbers: learned and encoded once, memory-mapped from then on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import RecipeError
from trimtab.tasks.data import prepared
from trimtab.tasks.text.tokens import BEGIN, END, PAD, encode, learn, read_tokenizer
from trimtab.tasks.translation.pairs import PARTS, Corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]
_AT_A_TIME = 50_000  # lines that are encoded together


@dataclass(frozen=True)
class Sentences:
    """Token numbers of many sentences, one after the other, without special ones.

    Attributes:
        tokens: of all of them.
        offsets: where each begins, and the last ends, (N + 1,), int64.
    """

    tokens: Array
    offsets: Array

    @property
    def lengths(self) -> Tensor:
        """Tokens of each, (N,), int64, without special ones."""
        return torch.from_numpy(np.diff(self.offsets))

    def batch(self, indices: Tensor, begin: bool = False) -> Tensor:
        """Some sentences with their end, (B, L), int64, padded.

        Args:
            indices: which, (B,).
            begin: whether they have a begin, too.
        """
        rows = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in indices.tolist()]
        return padded(rows, begin)


@dataclass(frozen=True)
class Encoded:
    """A corpus as token numbers, and its vocabularies.

    Attributes:
        source: by part.
        target: by part.
        references: the target's text, of the parts that are not trained on.
        source_tokenizer: as `read_tokenizer` reads it.
        target_tokenizer: the same text for a joint vocabulary.
    """

    source: dict[str, Sentences]
    target: dict[str, Sentences]
    references: dict[str, list[str]]
    source_tokenizer: str
    target_tokenizer: str


def padded(rows: Sequence[Array], begin: bool = False) -> Tensor:
    """Sentences with their end, and perhaps their begin, (B, L), int64, filled up with padding."""
    longest = max(map(len, rows)) + 1 + begin
    batch = np.full((len(rows), longest), PAD, dtype=np.int64)
    if begin:
        batch[:, 0] = BEGIN
    for place, row in zip(batch, rows, strict=True):
        place[begin : begin + len(row)] = row
        place[begin + len(row)] = END
    return torch.from_numpy(batch)


def load_encoded(corpus: Corpus, source_vocab: int, target_vocab: int, joint: bool) -> Encoded:
    """Learn byte-pair vocabularies on the training part, encode all parts, and keep all of it in the cache.

    Args:
        corpus: the pairs of sentences.
        source_vocab: tokens of the source's vocabulary.
        target_vocab: of the target's.
        joint: whether both languages have one vocabulary, of `source_vocab` tokens.

    Raises:
        DataError: the text cannot be read, or has no words to learn a vocabulary from.
        RecipeError: the text does not make so many tokens.
    """
    from tokenizers import __version__

    sizes = (source_vocab,) if joint else (source_vocab, target_vocab)
    key = ("1", __version__, *corpus.checksums, *map(str, sizes))
    arrays = prepared(f"translation-{corpus.name}", key, lambda: dict(_arrays(corpus, sizes)))
    source, target = (
        {part: Sentences(arrays[f"{part}-{side}"], arrays[f"{part}-{side}-offsets"]) for part in PARTS}
        for side in ("source", "target")
    )
    references = {part: _text(arrays[f"{part}-references"]).split("\n") for part in PARTS[1:]}
    first, last = _text(arrays["tokenizer-0"]), _text(arrays[f"tokenizer-{len(sizes) - 1}"])
    return Encoded(source, target, references, first, last)


def _arrays(corpus: Corpus, sizes: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    parts = corpus.read()
    texts = [parts["train"].source + parts["train"].target] if len(sizes) == 1 else list(parts["train"])
    tokenizers = [learn("bpe", text, size) for text, size in zip(texts, sizes, strict=True)]
    for number, (tokenizer, size) in enumerate(zip(tokenizers, sizes, strict=True)):
        made = tokenizer.get_vocab_size()
        if made != size:
            names = ("source_vocab", "target_vocab")[number : 3 - len(sizes) + number]
            raise RecipeError(
                f"{corpus.name} makes a vocabulary of {made} tokens at most, the recipe asks for {size}: "
                + " ".join(f"--model.{name.replace('_', '-')} {made}" for name in names)
            )
        yield f"tokenizer-{number}", _bytes(tokenizer.to_str())
        tokenizer.encode_special_tokens = True
    for part, pairs in parts.items():
        for side, tokenizer, lines in zip(("source", "target"), (tokenizers[0], tokenizers[-1]), pairs, strict=True):
            tokens, lengths = _encoded(tokenizer, lines)
            yield f"{part}-{side}", tokens
            yield f"{part}-{side}-offsets", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        if part != "train":
            yield f"{part}-references", _bytes("\n".join(pairs.target))


def plain_tokenizer(text: str) -> "Tokenizer":
    """A vocabulary as `read_tokenizer` reads it, to which a special token's name in a sentence is text as any other."""
    tokenizer = read_tokenizer(text)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _encoded(tokenizer: "Tokenizer", lines: list[str]) -> tuple[Array, list[int]]:
    """Tokens of all lines, one after the other, in as few bytes as their numbers need, and how many each has."""
    kind = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
    pieces, lengths = [np.empty(0, dtype=kind)], list[int]()
    for start in range(0, len(lines), _AT_A_TIME):
        rows = encode(tokenizer, [line.strip() for line in lines[start : start + _AT_A_TIME]])
        lengths += map(len, rows)
        pieces.append(np.concatenate(rows).astype(kind))
    return np.concatenate(pieces), lengths


def _bytes(text: str) -> Array:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _text(array: Array) -> str:
    return array.tobytes().decode()
