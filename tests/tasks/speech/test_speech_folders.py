from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from trimtab.errors import DataError
from trimtab.tasks.speech.features import log_mel, normalized
from trimtab.tasks.speech.sets import SpeechData, load_speech

RATE = 8000
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tone(frequency: float, seconds: float = 0.3) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three splits; in training two speakers in folders of their own, as FLAC and WAV."""
    folder = tmp_path / "corpus"
    for place, suffix, texts in (
        ("train/7/1", "flac", ["A B", "B"]),
        ("train/8", "wav", ["A  A"]),
        ("validation", "wav", ["B A"]),
        ("test", "wav", ["C"]),
    ):
        lines = []
        for i, text in enumerate(texts):
            name = f"{place.replace('/', '-')}-{i}"
            write(folder / place / f"{name}.{suffix}", tone(200 + 100 * i))
            lines.append(f"{name} {text}\n")
        (folder / place / "all.trans.txt").write_text("".join(lines))
    return folder


def load(folder: Path, skip_faulty: bool = False) -> SpeechData:
    return load_speech(str(folder), RATE, 20, SPLITS, skip_faulty)


def test_a_folder_is_read(corpus: Path) -> None:
    data = load(corpus)
    assert data.names == (
        "train/7/1/train-7-1-0", "train/7/1/train-7-1-1", "train/8/train-8-0", "validation/validation-0", "test/test-0",
    )  # fmt: skip
    assert data.texts == ("A B", "B", "A A", "B A", "C")
    assert [part.tolist() for part in (data.train, data.validation, data.test)] == [[0, 1, 2], [3], [4]]
    assert data.counts == {}
    features = data.read([1, 4])
    samples, _ = soundfile.read(corpus / "train/7/1/train-7-1-1.flac", dtype="float32")
    np.testing.assert_array_equal(features[0], normalized(log_mel(samples, RATE, 20)))
    assert [len(each) for each in features] == data.frames[torch.tensor([1, 4])].tolist() == [28, 28]


def spoil(corpus: Path) -> None:
    """One of each fault, in training."""
    train = corpus / "train" / "9"
    write(train / "rate.wav", tone(300), 16000)
    write(train / "stereo.wav", np.stack([tone(300)] * 2, axis=1))
    write(train / "short.wav", tone(300, 0.024))
    write(train / "untold.wav", tone(300))
    (train / "broken.flac").write_bytes(b"fLaC, or not")
    lines = ["rate A", "stereo A", "short A", "broken A", "missing A"]
    (train / "x.trans.txt").write_text("\n".join(lines))


FAULTS = {
    "left out: wrong sample rate": 1,
    "left out: several channels": 1,
    "left out: too short": 1,
    "left out: unreadable": 1,
    "left out: transcript without recording": 1,
    "left out: recording without transcript": 1,
}


def test_faults_are_counted_and_named_and_refused(corpus: Path) -> None:
    spoil(corpus)
    with pytest.raises(DataError) as told:
        load(corpus)
    message = str(told.value)
    for kind in FAULTS:
        assert f"1 × {kind.removeprefix('left out: ')}" in message
    assert "there is no missing.flac, .wav or .ogg" in message
    assert "untold.wav has no transcript" in message
    assert "; and 3 more. Mend or remove them, or leave them out with --skip-faulty" in message


def test_faults_are_left_out_as_asked_for_with_a_warning(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoil(corpus)
    data = load(corpus, skip_faulty=True)
    assert dict(data.counts) == FAULTS
    assert len(data.names) == 5
    assert "left out 1 × recording without transcript" in caplog.text


def test_what_is_wrong_with_a_recording_is_told_with_what_to_do(corpus: Path) -> None:
    write(corpus / "test" / "test-0.wav", tone(300), 16000)
    with pytest.raises(DataError, match=r"test-0\.wav has 16,000 samples a second, expected 8,000: .*sox .*-r 8000"):
        load(corpus)
    write(corpus / "test" / "test-0.wav", np.stack([tone(300)] * 2, axis=1))
    with pytest.raises(DataError, match=r"test-0\.wav has 2 channels, expected one"):
        load(corpus)
    write(corpus / "test" / "test-0.wav", tone(300))
    load(corpus)  # looked at again, since it has changed


def test_silence_and_empty_transcripts_are_used_and_counted(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(corpus / "train" / "8" / "silence.wav", np.zeros(RATE))
    with (corpus / "train" / "8" / "all.trans.txt").open("a") as file:
        file.write("silence\n\n")
    data = load(corpus)
    assert dict(data.counts) == {"silent recordings": 1, "empty transcripts": 1}
    silent = data.names.index("train/8/silence")
    assert data.texts[silent] == ""
    assert silent in data.train
    assert not data.read([silent])[0].any()
    assert "1 silent recordings, used as they are: train/8/silence" in caplog.text


def test_an_offset_without_sound_is_silence(corpus: Path) -> None:
    write(corpus / "train" / "8" / "train-8-0.wav", np.full(RATE, 0.25))
    assert dict(load(corpus).counts) == {"silent recordings": 1}


def test_of_two_recordings_with_one_name_the_second_is_a_fault(corpus: Path) -> None:
    write(corpus / "train" / "8" / "train-8-0.flac", tone(300))
    with pytest.raises(DataError, match=r"1 × second recording of a name: train/8/train-8-0\.wav beside .*0\.flac"):
        load(corpus)
    assert dict(load(corpus, skip_faulty=True).counts) == {"left out: second recording of a name": 1}


def test_large_letters_and_other_files(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = corpus / "train" / "8"
    (folder / "train-8-0.wav").rename(folder / "train-8-0.WAV")
    assert dict(load(corpus).counts) == {}
    for name in ("train-8-1.mp3", "SPEAKERS.TXT", ".hidden"):
        (folder / name).write_text("")
    assert dict(load(corpus).counts) == {"files of other kinds": 2}
    assert "2 files of other kinds than .flac, .wav, .ogg and .trans.txt: train/8/SPEAKERS.TXT" in caplog.text


def test_a_recording_that_breaks_later_is_named(corpus: Path) -> None:
    data = load(corpus)
    (corpus / "test" / "test-0.wav").write_bytes(b"")
    with pytest.raises(DataError, match=r"test-0\.wav cannot be read.*it was whole when the folder was looked at"):
        data.read([4])


def test_folders_that_are_made_otherwise_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus/dev is missing; a speech folder has train, dev, test"):
        load_speech(str(corpus), RATE, 20, ("train", "dev", "test"))
    (tmp_path / "corpus" / "dev").mkdir()
    with pytest.raises(DataError, match=r"corpus/dev has no \*\.trans\.txt"):
        load_speech(str(corpus), RATE, 20, ("train", "dev", "test"))
    (corpus / "test" / "more.trans.txt").write_text("test-0 AGAIN")
    with pytest.raises(DataError, match="tells the transcript of test-0 a second time"):
        load(corpus)
    with pytest.raises(DataError, match=r"unknown speech set 'timit'. There are an4, fsdd, librispeech"):
        load_speech("timit", RATE, 20, SPLITS)


def test_librispeech_is_looked_for_in_the_data_folder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"LibriSpeech is missing: get LibriSpeech from openslr\.org/12"):
        load_speech("librispeech", RATE, 20, SPLITS)
    corpus.rename(tmp_path / "LibriSpeech")
    assert len(load_speech("librispeech", RATE, 20, SPLITS).names) == 5
