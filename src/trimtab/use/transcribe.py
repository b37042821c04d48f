"""`trimtab transcribe`: recordings to text by a trained speech model."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from trimtab.errors import CheckpointError
from trimtab.models.speech_encoder import SpeechEncoder
from trimtab.tasks.speech import labels, ngram
from trimtab.tasks.speech.audio_files import AudioError, is_silent, read_audio
from trimtab.tasks.speech.decode import Beam, transcribe
from trimtab.tasks.speech.features import Samples
from trimtab.tasks.speech.metrics import word_error_rate
from trimtab.tasks.speech.sets.load import features_of
from trimtab.tasks.speech.sets.samples import SAMPLE_SETS, sample_recordings
from trimtab.tasks.speech.speech_recipe import SpeechRecipe
from trimtab.train.trained import load_trained, open_trained
from trimtab.use.wide_beam import tell_of_wide_beam
from trimtab.words import WordsError, parse_words


@dataclass(frozen=True)
class TranscribeOptions:
    """Write down what is said in recordings, a line for each.

    RUN is the folder of a run of a speech recipe; AUDIO are files (WAV, FLAC, OGG) of one channel and the recipe's
    sample rate, or names of data sets that hold recordings: fsdd, an4, librivox-mini, speech-commands-mini, yesno.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""

    audio: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="AUDIO")]
    """Files, or names of data sets."""

    beam: int | None = None
    """Width of the search, 1 for the best path; the recipe's by default. An n-gram is used if the recipe has one."""

    count: int = 10
    """How many recordings of a data set are taken."""

    def __post_init__(self) -> None:
        if not self.audio:
            raise WordsError("trimtab transcribe needs RUN and at least one AUDIO file")
        if "" in self.audio:
            raise WordsError("AUDIO must name files or data sets; got an empty word")
        if self.beam is not None and self.beam < 1:
            raise WordsError(f"--beam must be at least 1, got {self.beam}")
        if self.count < 1:
            raise WordsError(f"--count must be at least 1, got {self.count}")


@dataclass(frozen=True)
class _Recording:
    name: str
    text: str | None
    """What is said, if it is known."""
    features: Tensor
    """(1, T, F)."""


def transcribe_command(words: Sequence[str]) -> int:
    """Run `trimtab transcribe` with these words.

    Returns:
        The exit code: 0, or 1 if a recording could not be used; those that could are transcribed all the same.

    Raises:
        RunFolderError: the folder is no run of a speech recipe.
        CheckpointError: it has no whole checkpoint, or lacks its labels.
        DataError: a data set is missing.
        WordsError: an option is out of range.
    """
    options = parse_words(TranscribeOptions, words, prog="trimtab transcribe")
    trained = open_trained(options.run, SpeechRecipe)
    recipe = trained.recipe
    if labels.FILE not in trained.files:
        raise CheckpointError(f"{options.run} lacks its labels, files/{labels.FILE}: copy the whole run folder")
    known = labels.read_labels(trained.files[labels.FILE])
    if known.number != recipe.model.num_labels:
        raise CheckpointError(
            f"{options.run}: files/{labels.FILE} has {known.number} labels and the model {recipe.model.num_labels}: "
            "copy the whole run folder"
        )
    language = ngram.read_ngram(trained.files[ngram.FILE]) if ngram.FILE in trained.files else None
    beam = recipe.beam if options.beam is None else _of_width(recipe.beam, options.beam)
    tell_of_wide_beam(beam.width)
    model = load_trained(trained, lambda: SpeechEncoder(recipe.model))
    said, heard, wrong = [], [], 0
    for recording in _recordings(options, recipe):
        if isinstance(recording, AudioError):
            print(f"error: {recording}", file=sys.stderr)
            wrong += 1
            continue
        with torch.inference_mode():
            logits, lengths = model(recording.features, torch.tensor([recording.features.shape[1]]))
        text = transcribe(logits, lengths, known, beam, language)[0]
        if recording.text is None:
            print(f"{recording.name}: {text}", flush=True)
        else:
            print(f"{recording.name}: {text}   (said: {recording.text})", flush=True)
            said.append(_in_case_of(known, recording.text))
            heard.append(text)
    if said:
        unknown = sum(map(known.unknown, said))
        if unknown:
            print(f"note: {unknown:,} of the characters that were said are none of the model's", file=sys.stderr)
        print(f"word error rate of these {len(said)}: {word_error_rate(said, heard):.3f}")
    return 1 if wrong else 0


def _recordings(options: TranscribeOptions, recipe: SpeechRecipe) -> Iterator[_Recording | AudioError]:
    """Each recording, or what is wrong with it."""
    rate = recipe.sample_rate

    def features(samples: Samples) -> Tensor:
        return torch.from_numpy(features_of(recipe.data, samples, rate, recipe.model.in_features))[None]

    for name in options.audio:
        if name in SAMPLE_SETS and not Path(name).is_file():
            for sample in sample_recordings(name, options.count):
                if sample.sample_rate != rate:
                    yield AudioError(
                        "wrong sample rate",
                        f"the recordings of {name} have {sample.sample_rate:,} samples a second, expected {rate:,}: "
                        "take a set or a run of the same rate",
                    )
                    break
                yield _Recording(sample.name, sample.text, features(sample.samples))
            continue
        try:
            samples = read_audio(name, rate)
        except AudioError as error:
            yield error
            continue
        if is_silent(samples):
            print(f"note: {name} is silent, every sample is the same: what is written down is made up", file=sys.stderr)
        yield _Recording(name, None, features(samples))


def _in_case_of(known: labels.Labels, text: str) -> str:
    """A transcript in capital or small letters if the model has these alone, which sets differ in."""
    return min((text, text.upper(), text.lower()), key=known.unknown)


def _of_width(beam: Beam, width: int) -> Beam:
    return Beam() if width == 1 else replace(beam, width=width)
