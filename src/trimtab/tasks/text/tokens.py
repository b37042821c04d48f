"""Text to token numbers and back, by Hugging Face's `tokenizers`: characters, words, or byte-pair encoding.

Each function learns a vocabulary from texts; the same texts give the same one. Token numbers of the special tokens come
first, in the order of `SPECIAL`. What is made is a `tokenizers.Tokenizer`: ``encode_batch``, ``decode`` and ``to_str``
are its own, and `read_tokenizer` reads it back from a run's files.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from trimtab.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["characters", "words", "bpe"]
Tokens = np.ndarray[tuple[int], np.dtype[np.int32]]

PAD, BEGIN, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<s>", "<eos>", "<unk>")
LEAST_BYTE_PAIRS = 256 + len(SPECIAL)
"""Tokens of the smallest vocabulary of byte pairs: every byte is one."""
FILE = "tokenizer.json"
"""Under which name a task leaves its tokenizer in the run folder."""


def learn(kind: Kind, texts: Iterable[str], size: int | None = None) -> "Tokenizer":
    """Learn a vocabulary.

    Args:
        kind: "characters"; "words", separated by white space; or "bpe", byte-pair encoding of bytes (Sennrich et al.,
            arXiv 1508.07909), to which no character is unknown.
        texts: to learn from; they are gone through more than once.
        size: most tokens, the special ones included; the rarest characters or words are unknown then. Needed for
            "bpe", which has fewer only if the texts have no more pairs.

    Raises:
        DataError: there is no text to learn from, or `size` has no room for what must be there.
    """
    if not any(text.strip() for text in texts):
        raise DataError("there is no text to learn a vocabulary from: all of it is empty")
    if kind == "bpe":
        return _bpe(texts, size)
    return _counted(_characters_of if kind == "characters" else str.split, kind, texts, size)


def read_tokenizer(text: str) -> "Tokenizer":
    """Make a tokenizer again from what its ``to_str`` wrote.

    Raises:
        CheckpointError: it is damaged.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing finer
        raise CheckpointError(f"the run's {FILE} is damaged: {error}") from None


def encode(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[Tokens]:
    """The token numbers of each text, without special ones around them."""
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(each.ids, dtype=np.int32) for each in encoded]


def decode(tokenizer: "Tokenizer", rows: Iterable[Sequence[int]]) -> list[str]:
    """The text of each row of token numbers; special tokens are left out."""
    return tokenizer.decode_batch([list(map(int, row)) for row in rows], skip_special_tokens=True)


def _bpe(texts: Iterable[str], size: int | None) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if size is None or size < LEAST_BYTE_PAIRS:
        raise DataError(
            f"a vocabulary of byte pairs needs a size of at least {LEAST_BYTE_PAIRS}, 256 bytes among it; got {size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _counted(pieces: Callable[[str], Iterable[str]], kind: Kind, texts: Iterable[str], size: int | None) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    counts = Counter(piece for text in texts for piece in pieces(text))
    for special in SPECIAL:
        counts.pop(special, None)  # WikiText has its own <unk>
    room = len(counts) if size is None else size - len(SPECIAL)
    if room < 1:
        raise DataError(f"a vocabulary needs a size above its {len(SPECIAL)} special tokens, got {size}")
    known = sorted(counts, key=lambda piece: (-counts[piece], piece))[:room]
    vocabulary = {piece: number for number, piece in enumerate((*SPECIAL, *known))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.add_special_tokens(list(SPECIAL))
    if kind == "characters":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m:.)"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _characters_of(text: str) -> Iterable[str]:
    return text
