"""`SpeechRecipe`: speech recognition with a Transformer encoder and CTC, as a typed, frozen config."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import DataError, RecipeError
from trimtab.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from trimtab.tasks.notices import warn
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.speech import labels as labels_of_run
from trimtab.tasks.speech import ngram as ngram_of_run
from trimtab.tasks.speech.batches import SpeechBatch, make_batch, weight
from trimtab.tasks.speech.ctc import ctc_loss, frames_needed
from trimtab.tasks.speech.decode import Beam
from trimtab.tasks.speech.labels import Labels, labels_of
from trimtab.tasks.speech.metrics import word_error_rate
from trimtab.tasks.speech.ngram import count_ngrams
from trimtab.tasks.speech.scores import scores, summarize
from trimtab.tasks.speech.sets import SpeechData, load_speech
from trimtab.tasks.speech.sets.speech_data import first_few
from trimtab.tasks.speech.spec_augment import SpecAugment
from trimtab.tasks.task import Examples, Task


@dataclass(frozen=True, kw_only=True)
class SpeechRecipe(Recipe):
    """A `SpeechEncoder` that learns to transcribe by CTC. What decides is "wer", the word error rate, on validation.

    The loss is in nats a character of the transcripts, spaces included. Metrics: "wer" and "cer", the errors over the
    words and characters of all utterances together, by the best path; and "eval_loss". On the test examples, with a
    search, "beam_wer" and "beam_cer" too. With `batch_tokens`, frames count as tokens.

    Attributes:
        data: name of the speech set, or path of a folder, see `trimtab.tasks.speech.sets.load_speech`.
        model: the encoder.
        sample_rate: of the audio, Hz.
        splits: of a folder: its folders for training, validation and test.
        augment: what is hidden of the features in training.
        beam: how test utterances are searched.
        skip_faulty: whether recordings of a folder that cannot be used are left out, with a warning, and no error.

    Raises:
        RecipeError: a field is out of range, or has the wrong type.
    """

    data: str
    model: SpeechEncoderConfig
    sample_rate: int = 16000
    splits: tuple[str, str, str] = ("train", "validation", "test")
    augment: SpecAugment = SpecAugment()  # noqa: RUF009 - it is frozen
    beam: Beam = Beam()  # noqa: RUF009
    skip_faulty: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_rate < 1000:
            raise RecipeError(f"sample_rate must be at least 1000 Hz, got {self.sample_rate}")

    def task(self) -> Task:
        """Load the data and draw the model.

        Raises:
            DataError: the set cannot be loaded, or has nothing to learn from.
            RecipeError: the model does not fit the data.
        """
        data = load_speech(self.data, self.sample_rate, self.model.in_features, self.splits, self.skip_faulty)
        labels = labels_of([data.texts[i] for i in data.train])
        self._check_fit(data, labels)
        targets = [torch.tensor(labels.encode(text), dtype=torch.int64) for text in data.texts]
        possible = self._possible(data, targets)
        train = data.train[possible[data.train]]
        if not len(train):
            raise DataError(f"no transcript of {self.data} fits into the frames of its recording")
        _warn_of_impossible(data, possible)
        train_texts = [data.texts[i] for i in train]
        ngram = count_ngrams(self.beam.ngram, train_texts, labels.characters) if self.beam.ngram else None

        def examples(chosen: Tensor, augment: SpecAugment | None = None) -> Examples:
            def batch(indices: Tensor, generator: torch.Generator) -> SpeechBatch:
                return make_batch(data, targets, chosen[indices], augment, generator)

            return Examples(len(chosen), batch, lengths=data.frames[chosen].unsqueeze(1))

        def loss(model: nn.Module, batch: SpeechBatch) -> Tensor:
            logits, lengths = model(batch.features, batch.lengths)
            nats = ctc_loss(logits, lengths, batch.targets, batch.target_lengths)
            return nats.sum() / weight(batch)

        def score(model: nn.Module, batch: SpeechBatch) -> dict[str, Tensor]:
            return scores(model, batch, data.texts, labels)

        def test_score(model: nn.Module, batch: SpeechBatch) -> dict[str, Tensor]:
            return scores(model, batch, data.texts, labels, self.beam, ngram)

        return Task(
            model=SpeechEncoder(self.model),
            train=examples(train, self.augment),
            loss=loss,
            weight=weight,
            evaluation=examples(data.validation),
            test=examples(data.test),
            score=score,
            test_score=test_score,
            summarize=summarize,
            metric="wer",
            higher_is_better=False,
            facts=_facts(data, labels, train, possible),
            files={labels_of_run.FILE: labels.to_text()} | ({ngram_of_run.FILE: ngram.to_text()} if ngram else {}),
        )

    def _check_fit(self, data: SpeechData, labels: Labels) -> None:
        for name, expected in (("in_features", data.in_features), ("num_labels", labels.number)):
            got = getattr(self.model, name)
            if got != expected:
                shown = f" (the blank and {labels.characters!r})" if name == "num_labels" else ""
                raise RecipeError(
                    f"{self.data} needs model {name} {expected}{shown}, the recipe has {got}: "
                    f"--model.{name.replace('_', '-')} {expected}"
                )
        for name, part in (("validation", data.validation), ("test", data.test)):
            if not any(data.texts[i] for i in part):
                raise DataError(f"all transcripts of the {name} part of {self.data} are empty: no word to be right in")

    def _possible(self, data: SpeechData, targets: Sequence[Tensor]) -> Tensor:
        """Whether CTC can emit the labels of each utterance in its frames, (N,), bool."""
        needed = torch.tensor([frames_needed(each.tolist()) for each in targets])
        return needed <= self.model.frames_out(data.frames)


def _warn_of_impossible(data: SpeechData, possible: Tensor) -> None:
    for part, what in (
        (data.train, "left out of training"),
        (torch.cat([data.validation, data.test]), "without a loss"),
    ):
        names = [data.names[i] for i in part[~possible[part]]]
        if names:
            warn(f"{data.name}: {len(names):,} transcripts too long for CTC, {what}: {first_few(names)}")


def _facts(data: SpeechData, labels: Labels, train: Tensor, possible: Tensor) -> dict[str, Any]:
    """About the examples, for run.json: how many, what was counted, and what the most frequent transcript is worth."""
    parts = {"train": train, "validation": data.validation, "test": data.test}
    texts = {name: [data.texts[i] for i in part] for name, part in parts.items()}
    frequent = Counter(texts["train"]).most_common(1)[0][0]
    counts = dict(data.counts)
    for name, part in (("training", data.train), ("validation", data.validation), ("test", data.test)):
        if impossible := int((~possible[part]).sum()):
            counts[f"too long for CTC, {name}"] = impossible
    if unknown := sum(labels.unknown(text) for name in ("validation", "test") for text in texts[name]):
        counts["unknown characters"] = unknown
    return {
        "utterances": {name: len(part) for name, part in parts.items()},
        "found": counts,
        "most_frequent_transcript": frequent,
        "most_frequent_transcript_wer": {
            name: word_error_rate(texts[name], [frequent] * len(texts[name])) for name in ("validation", "test")
        },
    }
