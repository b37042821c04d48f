import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trimtab.errors import DataError, RecipeError
from trimtab.models.gpt import GPT, GPTConfig
from trimtab.tasks.language import LanguageRecipe
from trimtab.tasks.language.language_recipe import perplexities
from trimtab.tasks.language.ngram import nats_per_token
from trimtab.tasks.language.recipes import LANGUAGE_RECIPES
from trimtab.train import Hardware, train

CPU = Hardware(accelerator="cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def book(path: Path) -> str:
    """A text of sentences, 25 kB."""
    random = np.random.default_rng(0)
    names, verbs = ("Anna", "Peter", "the cat", "a dog"), ("sees", "likes", "follows")
    lines = [
        f"{names[random.integers(4)]} {verbs[random.integers(3)]} {names[random.integers(4)]}." for _ in range(900)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def counting(path: Path) -> str:
    """Digits that count, from a random one in each line on, with two letters between: a trigram sees these alone."""
    starts = np.random.default_rng(0).integers(10, size=400)
    path.write_text("".join("xy".join(str((start + place) % 10) for place in range(20)) + "\n" for start in starts))
    return str(path)


def recipe(data: str, **changes: object) -> LanguageRecipe:
    small = LanguageRecipe(
        data=data,
        tokens="characters",
        model=GPTConfig(None, context=16, dim=16, depth=1, num_heads=2),
        lr=1e-2,
        batch_size=8,
        steps=4,
        watch_every=2,
        eval_every=2,
    )
    return replace(small, **changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"stride": 5}, {"tokens": "words"}, {"tokens": "bpe", "stride": 4, "vocab": 290}, {"evaluation_tokens": 333}],
)
def test_perplexities_are_those_of_the_whole_text(tmp_path: Path, changes: dict[str, object]) -> None:
    changes = dict(changes)
    vocab = changes.pop("vocab", None)
    made = recipe(book(tmp_path / "book.txt"), model=GPTConfig(vocab, 16, 16, 1, 2), **changes)
    result = train(made, tmp_path / "run", hardware=CPU)
    streams = made.streams()
    torch.manual_seed(made.seed)
    model = made.task().model.eval()
    stream, stride, context = streams.validation, made.stride or 16, 16
    size = made.evaluation_tokens or stream.size
    tokens = torch.from_numpy(stream.tokens[: size + 1].astype(np.int64))
    nats, done = 0.0, 0
    with torch.no_grad():
        while done < size:  # one window after the other
            end = context if done == 0 else min(done + stride, size)
            logits = model(tokens[None, end - context : end])[0]
            nats += F.cross_entropy(logits[done - end :], tokens[done + 1 : end + 1], reduction="sum").item()
            done = end
    lines = (tmp_path / "book.txt").read_bytes()
    parts = lines[int(0.9 * len(lines)) :].partition(b"\n")[2]  # from the validation text on
    text = parts[:size].decode() if made.evaluation_tokens else "".join(_lines(stream, streams.tokenizer, made.tokens))
    words = len(text.split()) + text.count("\n")
    initial = result.initial
    assert initial["eval_loss"] == pytest.approx(nats / size, rel=1e-5)
    assert initial["perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-4)
    assert initial["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-3)
    if made.tokens == "words":
        assert initial["word_perplexity"] == pytest.approx(initial["perplexity"])


def _lines(stream: object, tokenizer: object, kind: str) -> list[str]:
    from trimtab.tasks.language.streams import decoded

    return [decoded(tokenizer, kind, stream.tokens[1:].tolist())]


def test_the_loss_is_that_of_the_next_token(tmp_path: Path) -> None:
    task = recipe(book(tmp_path / "book.txt")).task()
    tokens = task.train.batch(torch.tensor([0, 5, 7]), torch.Generator())
    log = task.model(tokens[:, :-1]).log_softmax(-1)
    by_hand = -torch.stack([log[b, t, tokens[b, t + 1]] for b in range(3) for t in range(16)]).mean()
    torch.testing.assert_close(task.loss(task.model, tokens), by_hand)


def test_a_run_tells_its_vocabulary_and_what_is_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.txt").write_text("a b c d e f g h i j\n" * 10)
    (folder / "valid.txt").write_text("a x y d e f g h i j\n" * 10)
    made = recipe(str(folder), tokens="words")
    with caplog.at_level("WARNING", "trimtab"):
        result = train(made, tmp_path / "run", hardware=CPU)
    assert caplog.messages[0].startswith("validation: 20 of 110 tokens are not in the vocabulary, and count as <unk>")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["vocab_size"] == 14
    assert info["train"] == {"tokens": 110, "words": 110, "unknown_tokens": 0}
    assert info["validation"] == {"tokens": 110, "words": 110, "unknown_tokens": 20}
    assert result.test == {}
    assert json.loads((tmp_path / "run" / "files" / "tokenizer.json").read_text())


def test_the_vocabulary_is_at_most_what_the_model_says(tmp_path: Path) -> None:
    made = recipe(book(tmp_path / "book.txt"), tokens="words")
    whole, few = made.task(), replace(made, model=replace(made.model, vocab_size=7)).task()
    assert whole.facts["vocab_size"] > 7
    assert few.model.embedding.num_embeddings == few.facts["vocab_size"] == 7
    assert few.facts["train"]["unknown_tokens"] > 0


def test_a_gpt_sees_further_than_a_trigram(tmp_path: Path) -> None:
    data, model = counting(tmp_path / "digits.txt"), GPTConfig(None, 16, 32, 1, 2, positions="rotary")
    made = recipe(data, model=model, steps=150, watch_every=50, eval_every=150, batch_size=16, watch=False)
    result = train(made, tmp_path / "run", hardware=CPU)
    trigram = nats_per_token(made.streams())
    # of a line's 59 characters it knows nothing of 20 digits, and not which of them is the last
    expected = 20 / 59 * (math.log(10) - 0.95 * math.log(0.95) - 0.05 * math.log(0.05))
    assert trigram["test"] == pytest.approx(expected, rel=0.01)
    assert result.test["eval_loss"] < 0.7 * trigram["test"]
    assert result.metrics["eval_loss"] < 0.7 * trigram["validation"]


def test_a_loss_beyond_all_numbers_is_a_perplexity_without_end() -> None:
    found = perplexities({"nats": 1e6, "tokens": 100.0, "words": 20.0}, 3)
    assert found == {"eval_loss": 1e4, "perplexity": math.inf, "word_perplexity": math.inf}


def test_fields_that_fit_no_text_are_refused(tmp_path: Path) -> None:
    data = book(tmp_path / "book.txt")
    with pytest.raises(RecipeError, match=r"stride must be from 1 to model\.context, 16; got 17"):
        recipe(data, stride=17)
    with pytest.raises(RecipeError, match=r"evaluation_tokens must be at least model\.context, 16; got 15"):
        recipe(data, evaluation_tokens=15)
    with pytest.raises(RecipeError, match="tokens must be one of characters, words, bpe"):
        recipe(data, tokens="bytes")
    with pytest.raises(RecipeError, match=r"needs a size, of at least 260; got None: --model\.vocab-size 4096"):
        recipe(data, tokens="bpe")
    with pytest.raises(DataError, match=r"the validation text of book has .* fewer than a context of 5,000"):
        recipe(data, model=GPTConfig(None, 5000, 16, 1, 2)).task()


@pytest.mark.parametrize("name", LANGUAGE_RECIPES)
def test_recipes_make_models_of_the_size_they_say(name: str) -> None:
    made = LANGUAGE_RECIPES[name]()
    assert isinstance(made, LanguageRecipe)
    if not name.startswith("gpt-wikitext103"):
        model = made.make_model(made.model.vocab_size or 100)
        assert isinstance(model, GPT)
