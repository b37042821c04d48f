"""The sets that have names, from their real files."""

import io
import lzma
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import RecipeError
from trimtab.tasks.data import DATA_SETS, read_data
from trimtab.tasks.speech.cepstra import cepstra
from trimtab.tasks.speech.features import log_mel, normalized
from trimtab.tasks.speech.sets import SpeechData, digits, load_speech
from trimtab.tasks.speech.sets.samples import SAMPLE_SETS, sample_recordings

pytestmark = pytest.mark.skipif(not os.environ.get("TRIMTAB_DATA"), reason="TRIMTAB_DATA is not set")

SPLITS = ("train", "validation", "test")


@cache
def raw(data: str, file: str) -> dict[str, np.ndarray]:
    return dict(np.load(io.BytesIO(lzma.decompress(read_data(DATA_SETS[data], file)))))


@pytest.fixture(scope="module")
def an4() -> SpeechData:
    return load_speech("an4", 16000, 39, SPLITS)


@pytest.fixture(scope="module")
def fsdd() -> SpeechData:
    return load_speech("fsdd", 8000, 40, SPLITS)


def test_an4_has_its_own_split_and_speakers_held_out(an4: SpeechData) -> None:
    stored = raw("an4", "an4_mfcc.npz.xz")
    parts = [an4.train, an4.validation, an4.test]
    assert sum(map(len, parts)) == len(an4.names) == 948 + 130
    speakers = [{an4.names[i].split("-")[1] for i in part} for part in parts]
    assert [len(each) for each in speakers] == [66, 8, 10]
    assert len(set().union(*speakers)) == 84  # none is in two parts
    assert [an4.names[i] for i in an4.test] == stored["test_id"].tolist()
    assert [an4.texts[i] for i in an4.test] == stored["test_text"].tolist()


def test_an4_features_are_the_cepstra_with_slopes_normalised(an4: SpeechData) -> None:
    stored = raw("an4", "an4_mfcc.npz.xz")
    start, stop = stored["train_offsets"][3:5]
    cepstra = stored["train_mfcc"][start:stop]
    (features,) = an4.read([3])
    assert features.shape == (int(an4.frames[3]), 39) == (stop - start, 39)
    np.testing.assert_allclose(features[:, :13], (cepstra - cepstra.mean(axis=0)) / cepstra.std(axis=0), atol=1e-4)
    for i in (0, 500, 1077):
        (features,) = an4.read([i])
        np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(features.std(axis=0), 1, atol=1e-4)


def test_digit_strings_are_of_one_speaker_and_of_recordings_of_their_split() -> None:
    stored = raw("fsdd", "fsdd.npz.xz")
    audio, offsets = stored["audio"], stored["offsets"]
    # a recording is known by its first 256 samples; two of them begin with the same 64
    known = {audio[offsets[i] : offsets[i] + 256].tobytes(): i for i in range(3000)}
    assert len(known) == 3000
    used: dict[str, set[int]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for name, text, samples in digits.strings(stored, split):
            steps = np.round(samples * 32768).astype(np.int16)
            place, said = 0, []
            while place < len(steps):
                found = known.get(steps[place : place + 256].tobytes())
                if found is None:  # a pause
                    place += 1
                    continue
                length = offsets[found + 1] - offsets[found]
                np.testing.assert_array_equal(steps[place : place + length], audio[offsets[found] : offsets[found + 1]])
                assert f"-{stored['speakers'][stored['speaker'][found]]}-" in name
                used[split].add(found)
                said.append(str(stored["label"][found]))
                place += length
            assert " ".join(said) == text
            assert 3 <= len(said) <= 7
            if split == "train" and name.endswith("-20"):
                break  # the first speaker's, for time
    assert all(stored["index"][i] < 5 for i in used["test"])
    assert all(stored["index"][i] >= 45 for i in used["validation"])
    assert all(5 <= stored["index"][i] < 45 for i in used["train"])
    assert len(used["test"]) > 290  # nearly all of the 300


def test_digit_features_are_those_of_the_strings(fsdd: SpeechData) -> None:
    assert [fsdd.names[i].split("-")[0] for i in (fsdd.train[0], fsdd.validation[0], fsdd.test[0])] == list(SPLITS)
    assert len(fsdd.train) + len(fsdd.validation) + len(fsdd.test) == len(fsdd.names)
    name, text, samples = next(digits.strings(raw("fsdd", "fsdd.npz.xz"), "test"))
    first = int(fsdd.test[0])
    assert (fsdd.names[first], fsdd.texts[first]) == (name, text)
    np.testing.assert_array_equal(fsdd.read([first])[0], normalized(log_mel(samples, 8000, 40)))


def test_sets_at_another_rate_are_refused() -> None:
    with pytest.raises(RecipeError, match="an4 is from audio of 16000 Hz, the recipe has 8000"):
        load_speech("an4", 8000, 39, SPLITS)
    with pytest.raises(RecipeError, match="fsdd is audio of 8000 Hz, the recipe has 16000: --sample-rate 8000"):
        load_speech("fsdd", 16000, 40, SPLITS)


def test_the_cepstra_of_an4_are_made_from_audio_exactly() -> None:
    stored, audio = raw("an4", "an4_mfcc.npz.xz"), raw("an4", "an4_wav40.npz.xz")
    for part in ("train", "test"):
        place = {str(name): i for i, name in enumerate(stored[f"{part}_id"])}
        for i, name in enumerate(audio[f"{part}_id"]):
            start, stop = stored[f"{part}_offsets"][place[str(name)] :][:2]
            first, last = audio[f"{part}_offsets"][i : i + 2]
            found = cepstra((audio[f"{part}_audio"][first:last] / 32768).astype(np.float32))
            # they come as float32, and were computed so: 1.4e-5 was seen
            np.testing.assert_allclose(found, stored[f"{part}_mfcc"][start:stop], atol=1e-4)


@pytest.mark.parametrize("name", SAMPLE_SETS)
def test_sample_recordings_are_audio_with_what_is_said(name: str) -> None:
    found = sample_recordings(name, 3)
    assert len(found) == 3
    for sample in found:
        assert sample.name.startswith(f"{name}/")
        assert sample.samples.dtype == np.float32
        assert 0.01 < np.abs(sample.samples).max() <= 1
        assert sample.sample_rate in (8000, 16000)
        assert sample.text
        assert sample.text.strip() == sample.text


def test_sample_recordings_of_an4_are_test_recordings(an4: SpeechData) -> None:
    test = {an4.names[i]: an4.texts[i] for i in an4.test}
    for sample in sample_recordings("an4", 99):
        assert test[Path(sample.name).name] == sample.text
