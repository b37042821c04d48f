"""Texts as streams of tokens: made once, small numbers, memory-mapped from then on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.tasks.data import prepared
from trimtab.tasks.language.texts import Texts
from trimtab.tasks.text.tokens import BEGIN, END, PAD, UNKNOWN, Kind, encode, learn, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FORMAT = "2"  # of the arrays that are made here
_PIECE = 2**17  # characters that are encoded at a time
_TOKENIZER = "tokenizer"

Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Stream:
    """One text.

    Attributes:
        name: for errors.
        tokens: (N + 1,), uint16 or int32: the end of a line, and the N tokens of the text, which follow it.
        words: words of the text, separated by white space, and one for the end of each line; where words are the
            tokens, the tokens (a text that names a special token may have several to a word).
        unknown: how many of the tokens stand for what the vocabulary lacks.
    """

    name: str
    tokens: Numbers
    words: int
    unknown: int

    @property
    def size(self) -> int:
        """Number N of tokens."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Streams:
    """The parts of a data set, and their vocabulary, which is learned from the first."""

    tokenizer: "Tokenizer"
    train: Stream
    validation: Stream
    test: Stream | None


def streams_of(texts: Texts, kind: Kind, vocab_size: int | None) -> Streams:
    """The token streams of texts, from the cache if they have been made before.

    Args:
        texts: all parts.
        kind: "characters"; "words", separated by white space, with a token for the end of each line; or "bpe".
        vocab_size: most tokens of the vocabulary; None for no limit.

    Raises:
        DataError: a text cannot be read, there is nothing to learn from, or `vocab_size` is too small.
    """
    import tokenizers

    parts = {"train": texts.train, "validation": texts.validation}
    if texts.test is not None:
        parts["test"] = texts.test

    def make() -> dict[str, Numbers]:
        # read twice, line by line: `learn` asks for no more than that
        tokenizer = learn(kind, texts.train, vocab_size)
        arrays = {_TOKENIZER: np.frombuffer(tokenizer.to_str().encode(), np.uint8)}
        for name, text in parts.items():
            arrays[name], counts = _stream(tokenizer, kind, text)
            arrays[f"{name}-counts"] = np.array(counts)
        return arrays

    sources = [_FORMAT, tokenizers.__version__, kind, str(vocab_size), texts.checksum]
    arrays = prepared(f"{texts.name}-{kind}", sources, make)
    made = {
        name: Stream(f"the {name} text of {texts.name}", arrays[name], *arrays[f"{name}-counts"].tolist())
        for name in parts
    }
    tokenizer = read_tokenizer(arrays[_TOKENIZER].tobytes().decode())
    return Streams(tokenizer, made["train"], made["validation"], made.get("test"))


def line_end(tokenizer: "Tokenizer", kind: Kind) -> int:
    """The token that ends a line, and that every text follows."""
    return END if kind == "words" else int(encode(tokenizer, ["\n"])[0][0])


def encoded(tokenizer: "Tokenizer", kind: Kind, lines: Iterable[str]) -> Iterator[Numbers]:
    """The tokens of lines, a bounded number of lines at a time.

    Args:
        tokenizer: as `learn` made it.
        kind: the same.
        lines: each with its newline; the last may lack one, and then has no token for it.
    """
    gathered: list[str] = []
    size = 0
    for piece in _pieces(lines) if kind == "characters" else lines:
        gathered.append(piece)
        size += len(piece)
        if size >= _PIECE:
            yield _encoded(tokenizer, kind, gathered)
            gathered, size = [], 0
    if gathered:
        yield _encoded(tokenizer, kind, gathered)


def decoded(tokenizer: "Tokenizer", kind: Kind, tokens: Iterable[int]) -> str:
    """The text of tokens, with `<unk>` for what the vocabulary lacks; words have one space between them.

    `<pad>` and `<s>` are left out: a model that draws one has not got it from a text, but for one that names it.
    """
    return _spelled(tokenizer, kind, [token for token in tokens if token not in (PAD, BEGIN)])


def _spelled(tokenizer: "Tokenizer", kind: Kind, tokens: list[int]) -> str:
    if kind == "bpe":
        return tokenizer.decode(tokens, skip_special_tokens=False)
    pieces = [tokenizer.id_to_token(token) or "" for token in tokens]
    if kind == "characters":
        return "".join(pieces)
    lines = " ".join("\n" if token == END else piece for token, piece in zip(tokens, pieces, strict=True))
    return lines.replace(" \n", "\n").replace("\n ", "\n")


def num_words(tokenizer: "Tokenizer", kind: Kind, tokens: Numbers) -> int:
    """How many words tokens stand for, with one for the end of each line, as in `Stream.words`."""
    if kind == "words":
        return len(tokens)
    lines = _spelled(tokenizer, kind, tokens.tolist()).split("\n")
    return sum(len(line.split()) for line in lines) + len(lines) - 1


def _stream(tokenizer: "Tokenizer", kind: Kind, text: Iterable[str]) -> tuple[Numbers, tuple[int, int]]:
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
    words = 0

    def counted() -> Iterator[str]:
        nonlocal words
        for line in text:
            words += len(line.split()) + 1
            yield line

    parts = [np.array([line_end(tokenizer, kind)], dtype)]
    parts += [part.astype(dtype) for part in encoded(tokenizer, kind, counted())]
    tokens = np.concatenate(parts)
    return tokens, (len(tokens) - 1 if kind == "words" else words, int((tokens == UNKNOWN).sum()))


def _encoded(tokenizer: "Tokenizer", kind: Kind, pieces: list[str]) -> Numbers:
    found = encode(tokenizer, pieces)
    if kind == "words":
        end = np.array([END], np.int32)
        found = [np.append(line, end[: text.endswith("\n")]) for text, line in zip(pieces, found, strict=True)]
    return np.concatenate(found)


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    """Cut what is longer than a piece; of characters it does not matter where."""
    for line in lines:
        for start in range(0, len(line), _PIECE):
            yield line[start : start + _PIECE]
