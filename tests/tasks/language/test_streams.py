from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import DataError
from trimtab.tasks.language.streams import Streams, decoded, encoded, line_end, num_words, streams_of
from trimtab.tasks.language.texts import find_texts
from trimtab.tasks.text.tokens import END, UNKNOWN, Kind

TRAIN = "the cat sat on the mat\n\nthe  dog sat\n" * 20
VALID = "the bird sat\n"
KINDS: tuple[Kind, ...] = ("characters", "words", "bpe")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def streams(folder: Path, kind: Kind, vocab_size: int | None = None, train: str = TRAIN, valid: str = VALID) -> Streams:
    folder.mkdir(exist_ok=True)
    (folder / "train.txt").write_text(train, encoding="utf-8")
    (folder / "valid.txt").write_text(valid, encoding="utf-8")
    return streams_of(find_texts(str(folder)), kind, vocab_size)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_text_after_the_end_of_a_line(tmp_path: Path, kind: Kind) -> None:
    made = streams(tmp_path / "text", kind, 300 if kind == "bpe" else None)
    tokens = made.train.tokens
    assert tokens.dtype == np.uint16
    assert tokens[0] == line_end(made.tokenizer, kind)
    assert made.train.size == len(tokens) - 1
    text = TRAIN.replace("  ", " ") if kind == "words" else TRAIN
    assert decoded(made.tokenizer, kind, tokens[1:].tolist()) == text
    assert made.train.words == num_words(made.tokenizer, kind, tokens[1:]) == 20 * (6 + 2 + 1 + 3)
    assert made.test is None


def test_words_are_those_between_white_space_and_one_for_the_end_of_each_line(tmp_path: Path) -> None:
    made = streams(tmp_path / "text", "words")
    words = [made.tokenizer.id_to_token(token) for token in made.train.tokens[1:13]]
    assert words == ["the", "cat", "sat", "on", "the", "mat", "<eos>", "<eos>", "the", "dog", "sat", "<eos>"]
    assert made.tokenizer.get_vocab_size() == 4 + 6


@pytest.mark.parametrize(("kind", "unknown"), [("characters", 4), ("words", 1), ("bpe", 0)])
def test_what_the_training_text_lacks_is_unknown_and_counted(tmp_path: Path, kind: Kind, unknown: int) -> None:
    made = streams(
        tmp_path / "text", kind, 300 if kind == "bpe" else None, valid="the bird sat\n" + "ü" * (kind == "characters")
    )
    expected = unknown if kind != "characters" else 3 + 1  # b, i, r of "bird", and ü
    assert made.validation.unknown == expected
    assert (made.validation.tokens == UNKNOWN).sum() == expected
    assert made.train.unknown == 0


def test_a_smaller_vocabulary_leaves_the_rarest_unknown(tmp_path: Path) -> None:
    made = streams(tmp_path / "text", "words", 4 + 2)
    assert made.tokenizer.get_vocab_size() == 6
    assert made.train.unknown == 20 * 4  # cat, on, mat, dog; the and sat are known


def test_long_lines_and_many_lines_are_encoded_in_parts_as_in_one(tmp_path: Path) -> None:
    made = streams(tmp_path / "text", "words")
    lines = ["the cat sat\n"] * 15_000
    parts = list(encoded(made.tokenizer, "words", lines))
    assert len(parts) > 1
    assert np.array_equal(
        np.concatenate(parts), np.tile(np.concatenate(list(encoded(made.tokenizer, "words", lines[:1]))), 15_000)
    )
    characters = streams(tmp_path / "text", "characters")
    (first, *rest) = encoded(characters.tokenizer, "characters", ["ca" * 70_000])
    assert rest
    assert sum(map(len, rest)) + len(first) == 140_000


def test_the_last_line_may_be_open(tmp_path: Path) -> None:
    made = streams(tmp_path / "text", "words")
    (tokens,) = encoded(made.tokenizer, "words", ["the cat\n", "sat"])
    assert [made.tokenizer.id_to_token(token) for token in tokens.tolist()] == ["the", "cat", "<eos>", "sat"]


def test_streams_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = streams(tmp_path / "text", "characters")
    monkeypatch.setattr("trimtab.tasks.language.streams.learn", None)
    again = streams(tmp_path / "text", "characters")
    assert np.array_equal(first.train.tokens, again.train.tokens)
    assert isinstance(again.train.tokens, np.memmap)
    assert first.tokenizer.to_str() == again.tokenizer.to_str()
    with pytest.raises(TypeError):  # another text is learned anew
        streams(tmp_path / "text", "characters", train=TRAIN + "x\n")


def test_a_vocabulary_too_large_for_16_bits_takes_32(tmp_path: Path) -> None:
    words = " ".join(f"w{number}" for number in range(70_000)) + "\n"
    made = streams(tmp_path / "text", "words", train=words)
    assert made.train.tokens.dtype == np.int32
    assert made.train.tokens.max() == 70_003


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text to learn a vocabulary from"):
        streams(tmp_path / "text", "characters", train="")


def test_what_no_text_has_is_not_printed(tmp_path: Path) -> None:
    made = streams(tmp_path / "text", "words")
    the = made.tokenizer.token_to_id("the")
    assert decoded(made.tokenizer, "words", [0, the, UNKNOWN, 1, END, END, the]) == "the <unk>\n\nthe"


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_a_text_that_names_special_tokens(tmp_path: Path, kind: Kind) -> None:
    text = "a <pad> <s> b<unk>c <unk>\n" * 20
    made = streams(tmp_path / "text", kind, 300 if kind == "bpe" else None, train=text)
    tokens = made.train.tokens[1:]
    assert made.train.words == num_words(made.tokenizer, kind, tokens)
    assert made.train.words == (len(tokens) if kind == "words" else 20 * 6)
