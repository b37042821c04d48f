"""What a translation run trains on, how it is scored, and that nothing is left out without a word."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from gloo_processes import in_processes
from translation_corpus import VOCABULARY, sentences, small_recipe, write_folder

from trimtab.errors import DataError, RecipeError
from trimtab.models.encoder_decoder import EncoderDecoder
from trimtab.tasks.text.tokens import BEGIN, END, PAD, UNKNOWN, decode
from trimtab.tasks.translation import bleu
from trimtab.tasks.translation.recipes import TRANSLATION_RECIPES
from trimtab.tasks.translation.sentences import plain_tokenizer
from trimtab.tasks.translation.translation_recipe import likelihood, summarize, translated, weight
from trimtab.train import Hardware, read_result, train
from trimtab.train.trained import load_trained, open_trained

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "own")


def plain(rows: Any) -> list[list[int]]:
    """Without begin, end and padding."""
    return [[token for token in row if token > UNKNOWN] for row in rows.tolist()]


def test_batches_hold_the_sentences(folder: Path) -> None:
    recipe = small_recipe(folder)
    task = recipe.task()
    english, german = sentences(80, 0)
    tokenizer = plain_tokenizer(task.files["tokenizer.json"])
    chosen = torch.tensor([7, 3, 50])
    source, target, rows = task.train.batch(chosen, GENERATOR)
    assert decode(tokenizer, plain(source)) == [english[row] for row in chosen]
    assert decode(tokenizer, plain(target)) == [german[row] for row in chosen]
    assert rows.tolist() == chosen.tolist()
    assert task.train.lengths is not None
    for row, (source_length, target_length) in enumerate(task.train.lengths[chosen].tolist()):
        assert source[row, source_length - 1] == END
        assert (source[row, source_length:] == PAD).all()
        assert target[row, 0] == BEGIN
        assert target[row, target_length] == END
        assert (target[row, target_length + 1 :] == PAD).all()
    assert weight((source, target, rows)) == task.train.lengths[chosen, 1].sum()


def test_vocabularies_are_learned_on_the_training_part(folder: Path) -> None:
    recipe = small_recipe(folder)
    before = recipe.task().files["tokenizer.json"]
    for language in ("en", "de"):
        for part in ("valid", "test"):
            (folder / f"{part}.{language}").write_text("xyzzy xyzzy xyzzy\n" * 50, encoding="utf-8")
    assert recipe.task().files["tokenizer.json"] == before
    separate = replace(recipe.model, tied="none", source_vocab=280, target_vocab=285)
    files = replace(recipe, model=separate).task().files
    assert list(files) == ["source-tokenizer.json", "target-tokenizer.json"]
    sizes = [plain_tokenizer(text).get_vocab_size() for text in files.values()]
    assert sizes == [280, 285]
    assert '["K","a"]' in files["target-tokenizer.json"]  # a merge of the German words
    assert '["K","a"]' not in files["source-tokenizer.json"]


def test_a_vocabulary_that_the_text_does_not_make(folder: Path) -> None:
    recipe = small_recipe(folder)
    asked = replace(recipe, model=replace(recipe.model, source_vocab=9999, target_vocab=9999))
    with pytest.raises(RecipeError, match=r"own makes a vocabulary of \d+ tokens at most, .* asks for 9999") as told:
        asked.task()
    made = int(str(told.value).split()[-1])
    assert f"--model.source-vocab {made} --model.target-vocab {made}" in str(told.value)
    fitting = replace(recipe.model, source_vocab=made, target_vocab=made)
    assert replace(recipe, model=fitting).task().model.head.weight.shape[0] == made  # type: ignore[union-attr]


def test_what_is_left_out_of_training_is_counted_and_nothing_of_the_rest(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = {"en": ["", "  ", "a dog", "the cat " * 40, "big dog"], "de": ["ein", "der", "", "die Katze", " "]}
    for part in ("train", "valid", "test"):
        for language, added in lines.items():
            with (folder / f"{part}.{language}").open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in added)
    with caplog.at_level("WARNING", "trimtab"):
        task = small_recipe(folder, max_length=60).task()
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "4 training pairs with an empty line are left out",
        "1 training pairs of more than 60 tokens are left out",
        "4 pairs of validation have an empty line, and count",
        "4 pairs of the test have an empty line, and count",
    ]
    assert task.facts["training_pairs"] == task.train.size == 80
    assert task.facts["training_pairs_with_an_empty_line"] == 4
    assert task.facts["training_pairs_too_long"] == 1
    assert task.facts["valid_pairs_with_an_empty_line"] == 4
    assert task.facts["valid_pairs_longer_than_in_training"] == task.facts["test_pairs_longer_than_in_training"] == 1
    assert task.evaluation is not None
    assert task.test is not None
    assert (task.evaluation.size, task.test.size) == (12 + 5, 10 + 5)
    everything = task.evaluation.batch(torch.arange(17), GENERATOR)
    scores = task.score(task.model.eval(), everything)  # type: ignore[misc]
    assert all(values.shape == (17,) and values.isfinite().all() for values in scores.values())
    assert scores["tokens"][14] == 1  # the end of an empty line
    with pytest.raises(
        DataError, match=r"no pair of .* is left to train on: 4 have an empty line, 81 a sentence of more"
    ):
        small_recipe(folder, max_length=2).task()


def test_a_part_without_a_whole_pair_is_refused(folder: Path) -> None:
    (folder / "valid.en").write_text("\n" * 12, encoding="utf-8")
    with pytest.raises(DataError, match=r"every pair of the valid part of .* has an empty line: nothing to measure"):
        small_recipe(folder).task()


def test_loss_is_smoothed_and_evaluation_is_not(folder: Path) -> None:
    recipe = small_recipe(folder, label_smoothing=0.2)
    task = recipe.task()
    model = task.model.double()
    source, target, rows = task.train.batch(torch.arange(5), GENERATOR)
    log_probs = model(source, target[:, :-1]).log_softmax(-1)
    nll, smoothed, count = [0.0] * 5, 0.0, 0
    for row in range(5):
        for place, token in enumerate(target[row, 1:].tolist()):
            if token != PAD:
                own = log_probs[row, place]
                nll[row] -= float(own[token].detach())
                smoothed -= float((0.8 * own[token] + 0.2 * own.mean()).detach())
                count += 1
    assert float(task.loss(model, (source, target, rows)).detach()) == pytest.approx(smoothed / count, rel=1e-9)
    found = likelihood(model.eval(), source, target)
    assert found["nll"].tolist() == pytest.approx(nll, rel=1e-6)  # summed in float32
    assert int(found["tokens"].sum()) == count == int(weight((source, target, rows)))
    means = {name: float(values.double().mean().detach()) for name, values in found.items()}
    assert summarize(means, 5) == {"eval_loss": pytest.approx(sum(nll) / count, rel=1e-6)}


def test_corpus_bleu_is_sacrebleus() -> None:
    references = ["A dog runs, doesn't it?", "Ein großer Hund schläft hier.", "the cat and the dog", "", "x"]
    translations = ["A dog runs, does not it?", "Ein Hund schläft.", "the the the the", "a", ""]
    for chosen in (slice(0, 5), slice(1, 3), slice(3, 5), slice(0, 1)):
        ours, theirs = translations[chosen], references[chosen]
        sums = {name: float(values.sum()) for name, values in bleu.counts(ours, theirs).items()}
        assert bleu.corpus_bleu(sums) == sacrebleu.corpus_bleu(ours, [theirs]).score
    metric = sacrebleu.BLEU()
    metric.corpus_score(translations, [references])
    assert bleu.signature() == str(metric.get_signature())


def test_a_run_learns_and_its_bleu_is_sacrebleus(folder: Path, tmp_path: Path) -> None:
    recipe = small_recipe(folder, steps=60, watch_every=60, eval_every=60)
    result = train(recipe, tmp_path / "run", hardware=Hardware(accelerator="cpu"))
    assert result.metric == "bleu"
    assert result.metrics["eval_loss"] < 0.2 * result.initial["eval_loss"]
    assert result.metrics["bleu"] > 1 > result.initial["bleu"]
    facts = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert facts["bleu_signature"] == bleu.signature()
    trained = open_trained(tmp_path / "run", type(recipe))
    model = load_trained(trained, lambda: EncoderDecoder(recipe.model))
    task = recipe.task()
    tokenizer = plain_tokenizer(trained.files["tokenizer.json"])
    for examples, seed, beam, penalty, told in (
        (task.evaluation, 1, 1, 0.0, result.metrics),
        (task.test, 2, 4, 0.6, result.test),
    ):
        assert examples is not None
        source, target, _ = examples.batch(torch.arange(examples.size), GENERATOR)
        texts = decode(tokenizer, translated(model, source, VOCABULARY, beam, penalty))
        _, german = sentences(examples.size, seed)
        assert told["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [german]).score, abs=1e-9)
        losses = F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)
        assert told["eval_loss"] == pytest.approx(float(losses.detach()), rel=1e-4)


@pytest.mark.parametrize("decode_when", ["test", "never"])
def test_translations_may_wait_or_be_left_out(folder: Path, tmp_path: Path, decode_when: Any) -> None:
    recipe = small_recipe(folder, decode=decode_when, steps=2, watch_every=1, eval_every=1)
    result = train(recipe, tmp_path / "run", hardware=Hardware(accelerator="cpu"))
    assert result.metric == "eval_loss"
    assert list(result.metrics) == ["eval_loss"]
    assert set(result.test) == ({"eval_loss", "bleu"} if decode_when == "test" else {"eval_loss"})


# SGD, since Adam turns a rounding error in a gradient near zero into a step of full length.
SHARED: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "stabilizer": "sigma", "steps": 2, "accumulate": 2}
SHARED |= {"watch_every": 2, "eval_every": 2, "batch_tokens": 640}


def check(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    for strategy in ("ddp", "fsdp"):
        hardware = Hardware(accelerator="cpu", strategy=strategy)  # type: ignore[arg-type]
        train(small_recipe(Path(folder, "own"), **SHARED), Path(folder, strategy), hardware=hardware)


def test_two_processes_translate_as_one(folder: Path, tmp_path: Path) -> None:
    alone = train(small_recipe(folder, **SHARED), tmp_path / "one", hardware=Hardware(accelerator="cpu"))
    in_processes(2, check, str(tmp_path))
    for strategy in ("ddp", "fsdp"):
        together = read_result(tmp_path / strategy)
        assert together is not None
        assert together.status == alone.status
        # float32 sums in another order, over two steps; the same translations
        assert together.metrics["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], rel=1e-4)
        assert together.metrics["bleu"] == pytest.approx(alone.metrics["bleu"], abs=1e-6)
        assert together.test == pytest.approx(alone.test, rel=1e-4)


def test_names_of_special_tokens_are_text(folder: Path) -> None:
    text = "the <pad> cat <eos> <unk> <s>\n"
    for language in ("en", "de"):
        (folder / f"valid.{language}").write_text(text, encoding="utf-8")
    task = small_recipe(folder).task()
    assert task.evaluation is not None
    source, target, _ = task.evaluation.batch(torch.tensor([0]), GENERATOR)
    tokenizer = plain_tokenizer(task.files["tokenizer.json"])
    assert decode(tokenizer, plain(source)) == [text.strip()]
    assert (source != PAD).all()
    assert (target == END).sum() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam": 0}, "beam must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"length_penalty": -1.0}, "length_penalty must be at least 0"),
        ({"decode": "sometimes"}, "decode must be one of always, test, never"),
    ],
)
def test_fields_out_of_range_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        small_recipe(tmp_path, **changes)


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"at least 260; got 259: --model\.source-vocab 4000 --model\.target-vocab"):
        replace(recipe, model=replace(recipe.model, source_vocab=259, target_vocab=259))


def test_another_padding_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"model\.pad must be 0"):
        replace(recipe, model=replace(recipe.model, pad=1))


def test_recipes_are_what_they_say() -> None:
    made = {name: make() for name, make in TRANSLATION_RECIPES.items()}
    for name, recipe in made.items():
        if "sigma" in name:
            assert (recipe.model.norm, recipe.warmup_steps) == ("post", 0)
            assert recipe.stabilizer.startswith("sigma")
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in EncoderDecoder(made[name].model).parameters()) for name in made}
    assert round(sizes["translate-multi30k"] / 1e6, 1) == 1.9
    assert round(sizes["translate-wmt17"] / 1e6) == 61
