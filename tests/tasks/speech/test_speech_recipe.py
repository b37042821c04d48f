import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from speech_corpus import RATE, recipe, spoken, write_corpus
from torch import Tensor, nn

from trimtab.errors import DataError, RecipeError
from trimtab.tasks.speech.batches import SpeechBatch
from trimtab.tasks.speech.ctc import ctc_loss
from trimtab.tasks.speech.decode import Beam
from trimtab.tasks.speech.labels import read_labels
from trimtab.tasks.speech.recipes import SPEECH_RECIPES
from trimtab.tasks.speech.spec_augment import SpecAugment
from trimtab.tasks.task import Examples, Task
from trimtab.train import Hardware, train
from trimtab.train.evaluate import evaluate
from trimtab.train.hardware import launched


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def drawn(corpus: Path, **changes: object) -> Task:
    torch.manual_seed(0)
    return recipe(corpus, **changes).task()


def all_of(examples: Examples, seed: int = 0) -> SpeechBatch:
    return examples.batch(torch.arange(examples.size), torch.Generator().manual_seed(seed))


def add(corpus: Path, split: str, name: str, text: str, samples: np.ndarray) -> None:
    soundfile.write(corpus / split / f"{name}.wav", samples, RATE)
    with (corpus / split / "all.trans.txt").open("a") as file:
        file.write(f"{name} {text}\n")


class Says(nn.Module):
    """Logits that are nearly certain of given labels, one after the other with blanks between."""

    def __init__(self, said: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.said = said

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        longest = 2 * max(map(len, self.said)) + 1
        logits = torch.zeros(len(self.said), longest, 5)
        logits[..., 0] = 20
        for row, labels in zip(logits, self.said, strict=True):
            for i, label in enumerate(labels):
                row[2 * i + 1, label] = 40
        return logits, torch.full((len(self.said),), longest)


def test_a_batch_is_padded_utterances_and_their_labels(corpus: Path) -> None:
    task = drawn(corpus)
    batch = task.train.batch(torch.tensor([3, 0]), torch.Generator())
    labels = read_labels(task.files["labels.json"])
    assert labels.characters == " ABC"
    lines = (corpus / "train" / "all.trans.txt").read_text().splitlines()
    for row, i in enumerate((3, 0)):
        text = lines[i].partition(" ")[2]
        assert labels.decode(batch.targets[row, : batch.target_lengths[row]].tolist()) == text
        assert not batch.features[row, batch.lengths[row] :].any()
        assert batch.features[row, : batch.lengths[row]].std() == pytest.approx(1, abs=0.01)
    assert batch.lengths.tolist() == task.train.lengths[torch.tensor([3, 0]), 0].tolist()
    assert batch.features.shape == (2, int(batch.lengths.max()), 20)


def test_only_training_batches_are_augmented_and_by_their_generator(corpus: Path) -> None:
    task = drawn(corpus, augment=SpecAugment(time_masks=2, time_width=10))
    plain = drawn(corpus)
    assert torch.equal(all_of(task.train, 1).features, all_of(task.train, 1).features)
    assert not torch.equal(all_of(task.train, 1).features, all_of(task.train, 2).features)
    assert torch.equal(all_of(plain.train, 1).features, all_of(plain.train, 2).features)
    assert not torch.equal(all_of(task.train, 1).features, all_of(plain.train).features)
    for name in ("evaluation", "test"):
        assert torch.equal(all_of(getattr(task, name)).features, all_of(getattr(plain, name)).features)


def test_the_loss_is_a_mean_over_characters_and_its_weight_their_number(corpus: Path) -> None:
    task = drawn(corpus)
    batch = all_of(task.train)
    nats = 0.0
    for i in range(task.train.size):
        one = task.train.batch(torch.tensor([i]), torch.Generator())
        logits, lengths = task.model(one.features, one.lengths)
        nats += ctc_loss(logits, lengths, one.targets, one.target_lengths).item()
    count = int(batch.target_lengths.sum())
    assert int(task.weight(batch)) == count
    assert task.loss(task.model, batch).item() == pytest.approx(nats / count, rel=1e-5)


def measured(task: Task, examples: Examples, batch_size: int) -> dict[str, float]:
    with launched(Hardware(accelerator="cpu"), "32") as fabric:
        return evaluate(fabric, task.model, task, examples, recipe(Path(), batch_size=batch_size))


def test_metrics_are_those_of_all_utterances_together(corpus: Path) -> None:
    task = drawn(corpus)
    batch = all_of(task.evaluation)
    logits, lengths = task.model.eval()(batch.features, batch.lengths)
    nats = ctc_loss(logits, lengths, batch.targets, batch.target_lengths).sum() / batch.target_lengths.sum()
    for size in (1, 2, 5):
        metrics = measured(task, task.evaluation, size)
        assert metrics["eval_loss"] == pytest.approx(nats.item(), rel=1e-5)
        assert set(metrics) == {"wer", "cer", "eval_loss"}


def test_wer_and_cer_are_those_of_jiwer(corpus: Path) -> None:
    task = drawn(corpus)
    batch = all_of(task.evaluation)
    labels = read_labels(task.files["labels.json"])
    texts = [line.partition(" ")[2] for line in (corpus / "validation" / "all.trans.txt").read_text().splitlines()]
    said = [texts[0], texts[1][:-1], "", f"{texts[3]} A", "C"]
    scores = task.score(Says([labels.encode(text) for text in said]), batch)
    metrics = task.summarize({name: value.double().mean().item() for name, value in scores.items()}, 5)
    assert metrics["wer"] == pytest.approx(jiwer.wer(texts, said))
    assert metrics["cer"] == pytest.approx(jiwer.cer(texts, said))


def test_what_is_too_long_for_ctc_is_left_out_of_the_losses_and_counted(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = drawn(corpus)
    for split in ("train", "validation"):
        add(corpus, split, "fast", "ABCABCABC AAAAAA", spoken("A"))  # 10 frames come in, 4 go out
    task = drawn(corpus)
    assert task.facts["found"] == {"too long for CTC, training": 1, "too long for CTC, validation": 1}
    assert "1 transcripts too long for CTC, left out of training: train/fast" in caplog.text
    assert "1 transcripts too long for CTC, without a loss: validation/fast" in caplog.text
    assert task.train.size == before.train.size == 12
    assert task.evaluation.size == before.evaluation.size + 1
    scores = task.score(task.model.eval(), all_of(task.evaluation))
    old = before.score(before.model.eval(), all_of(before.evaluation))
    for name in ("nats", "loss_characters"):
        torch.testing.assert_close(scores[name].sum(), old[name].sum())
    assert scores["words"].sum() == old["words"].sum() + 2
    add(corpus, "train", "endless", "A", spoken("A"))
    assert drawn(corpus).train.size == 13


def test_characters_that_training_lacks_are_counted_and_are_errors(corpus: Path) -> None:
    add(corpus, "test", "odd", "A É", spoken("AB"))
    task = drawn(corpus)
    assert task.facts["found"] == {"unknown characters": 1}
    batch = task.test.batch(torch.tensor([4]), torch.Generator())
    labels = read_labels(task.files["labels.json"])
    scores = task.score(Says([labels.encode("A B")]), batch)
    assert (scores["word_errors"].item(), scores["words"].item()) == (1, 2)


def test_silence_with_an_empty_transcript_trains(corpus: Path) -> None:
    add(corpus, "train", "silence", "", np.zeros(RATE))
    task = drawn(corpus)
    assert task.facts["found"] == {"silent recordings": 1, "empty transcripts": 1}
    batch = task.train.batch(torch.tensor([task.train.size - 1]), torch.Generator())
    assert batch.target_lengths.tolist() == [0]
    assert int(task.weight(batch)) == 1
    loss = task.loss(task.model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in task.model.parameters())


def test_facts_tell_what_the_most_frequent_transcript_is_worth(corpus: Path) -> None:
    for i in range(3):
        add(corpus, "train", f"more{i}", "A B", spoken("A B"))
    facts = drawn(corpus).facts
    texts = [line.partition(" ")[2] for line in (corpus / "test" / "all.trans.txt").read_text().splitlines()]
    assert facts["most_frequent_transcript"] == "A B"
    assert facts["most_frequent_transcript_wer"]["test"] == pytest.approx(jiwer.wer(texts, ["A B"] * 4))
    assert facts["utterances"] == {"train": 15, "validation": 5, "test": 4}


def test_a_search_measures_the_test_set_beside_the_best_path(corpus: Path) -> None:
    task = drawn(corpus, beam=Beam(width=4, ngram=2))
    assert "ngram.json" in task.files
    assert "beam_wer" not in measured(task, task.evaluation, 2)
    metrics = measured(task, task.test, 2)
    assert set(metrics) == {"wer", "cer", "eval_loss", "beam_wer", "beam_cer"}
    assert measured(task, task.test, 4) == pytest.approx(metrics)


def test_a_model_that_does_not_fit_is_refused(corpus: Path) -> None:
    model = recipe(corpus).model
    with pytest.raises(RecipeError, match=r"needs model num_labels 5 \(the blank and ' ABC'\), the recipe has 9"):
        drawn(corpus, model=replace(model, num_labels=9))
    (corpus / "test" / "all.trans.txt").write_text("0\n1\n2\n3\n")
    with pytest.raises(DataError, match=r"all transcripts of the test part of .* are empty"):
        drawn(corpus)
    with pytest.raises(RecipeError, match="sample_rate must be at least 1000 Hz"):
        recipe(corpus, sample_rate=0)


@pytest.mark.parametrize("batching", [{"batch_size": 6}, {"batch_tokens": 800}])
def test_a_run_trains_and_leaves_its_labels(corpus: Path, tmp_path: Path, batching: dict[str, int]) -> None:
    result = train(recipe(corpus, **batching), tmp_path / "run", hardware=Hardware(accelerator="cpu"))
    assert result.status == "finished"
    assert result.metric == "wer"
    assert result.metrics["eval_loss"] < result.initial["eval_loss"]
    assert set(result.test) == {"wer", "cer", "eval_loss"}
    assert read_labels((tmp_path / "run" / "files" / "labels.json").read_text()).characters == " ABC"


def test_micro_batches_make_the_step_of_the_whole_batch(corpus: Path, tmp_path: Path) -> None:
    losses = [
        train(recipe(corpus, accumulate=parts), tmp_path / str(parts), hardware=Hardware(accelerator="cpu")).loss
        for parts in (1, 3)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # sums in float32 in another order


@pytest.mark.parametrize("name", list(SPEECH_RECIPES))
def test_recipes_fit_their_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = SPEECH_RECIPES[name]()
    assert own.warmup_steps == 0 or not name.endswith("-sigma")
    assert (own.model.norm == "none") == name.endswith("-sigma")
    if own.data == "librispeech":  # the paper's size
        model = own.model
        assert (model.depth, model.dim, model.mlp_dim, model.num_heads, model.num_labels) == (36, 768, 3072, 4, 29)
        assert (model.dropout, model.layer_drop, model.kernel, model.stride, model.bias) == (0.3, 0.3, 7, 3, False)
        return
    if not os.environ.get("TRIMTAB_DATA"):
        pytest.skip("TRIMTAB_DATA is not set")
    monkeypatch.undo()  # the prepared features of earlier tests serve
    task = own.task()
    batch = task.train.batch(torch.arange(8), torch.Generator())
    assert task.loss(task.model, batch).isfinite()
    assert task.facts["found"] == {}
