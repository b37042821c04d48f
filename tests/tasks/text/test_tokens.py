import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import CheckpointError, DataError
from trimtab.tasks.text.tokens import SPECIAL, UNKNOWN, Kind, decode, encode, learn, read_tokenizer

TEXTS = ["the cat sat on the mat .", "the dog sat , too .\n", "über den Wolken  ist es schön", ""]


@pytest.mark.parametrize(("kind", "size"), [("characters", None), ("words", None), ("bpe", 300)])
def test_texts_come_back_also_from_a_file(kind: Kind, size: int | None) -> None:
    tokenizer = learn(kind, TEXTS, size)
    again = read_tokenizer(tokenizer.to_str())
    rows = encode(again, TEXTS)
    back = decode(again, rows)
    assert back == ([" ".join(text.split()) for text in TEXTS] if kind == "words" else TEXTS)
    assert [again.token_to_id(special) for special in SPECIAL] == [0, 1, 2, 3]
    assert learn(kind, TEXTS, size).to_str() == tokenizer.to_str()
    assert [row.tolist() for row in encode(tokenizer, TEXTS)] == [row.tolist() for row in rows]


@given(st.text().filter(lambda text: not any(special in text for special in SPECIAL)))
def test_to_byte_pairs_nothing_is_unknown(text: str) -> None:
    tokenizer = learn("bpe", TEXTS, 280)
    assert decode(tokenizer, encode(tokenizer, [text])) == [text]


def test_a_text_that_names_a_special_token_means_it() -> None:
    assert [row.tolist() for row in encode(learn("bpe", TEXTS, 280), SPECIAL)] == [[0], [1], [2], [3]]
    assert encode(learn("words", ["a <unk> b"]), ["<unk> a"])[0].tolist() == [UNKNOWN, 4]


def test_characters_and_words_count_the_frequent_first_and_know_what_they_do_not() -> None:
    words = learn("words", TEXTS, 6)
    assert [words.id_to_token(number) for number in range(6)] == [*SPECIAL, "the", "."]
    assert encode(words, ["the whale ."])[0].tolist() == [4, UNKNOWN, 5]
    characters = learn("characters", ["abca", "a\nb"])
    assert encode(characters, ["ab\nz"])[0].tolist() == [4, 5, characters.token_to_id("\n"), UNKNOWN]


def test_what_cannot_be_learned_or_read_is_refused() -> None:
    with pytest.raises(DataError, match="all of it is empty"):
        learn("words", ["", " \n"])
    with pytest.raises(DataError, match="at least 260, 256 bytes among it; got 100"):
        learn("bpe", TEXTS, 100)
    with pytest.raises(DataError, match="size above its 4 special tokens, got 4"):
        learn("characters", TEXTS, 4)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        read_tokenizer("{")
