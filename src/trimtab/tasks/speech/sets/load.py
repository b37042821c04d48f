"""A speech set by its name."""

from pathlib import Path

from trimtab.errors import DataError
from trimtab.tasks.data import data_folder
from trimtab.tasks.speech.audio_files import audio_features
from trimtab.tasks.speech.features import Features, Samples
from trimtab.tasks.speech.sets import an4, digits
from trimtab.tasks.speech.sets.folder import load_folder
from trimtab.tasks.speech.sets.speech_data import SpeechData
from trimtab.words import nearest

LIBRISPEECH = "librispeech"
Splits = tuple[str, str, str]


def load_speech(name: str, sample_rate: int, bins: int, splits: Splits, skip_faulty: bool = False) -> SpeechData:
    """Load a speech set.

    Args:
        name: "an4" (cepstra; `bins` do not matter), "fsdd" (strings of digits), "librispeech" (the
            folder LibriSpeech in the data folder), or the path of a folder that is made like that one.
        sample_rate: in Hz; audio of another one is faulty.
        bins: mel bins.
        splits: of a folder: its folders for training, validation and test.
        skip_faulty: leave out recordings of a folder that cannot be used, with a warning, instead of refusing it.

    Raises:
        DataError: there is no such set, or it is damaged.
        RecipeError: the sample rate is not the set's.
    """
    if name == an4.NAME:
        return an4.load_an4(sample_rate)
    if name == digits.NAME:
        return digits.load_digits(sample_rate, bins)
    if name == LIBRISPEECH:
        folder = data_folder() / "LibriSpeech"
        if not folder.is_dir():
            raise DataError(
                f"{folder} is missing: get LibriSpeech from openslr.org/12, and put or link its folder there"
            )
        return load_folder(name, folder, splits, sample_rate, bins, skip_faulty)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        known = (an4.NAME, digits.NAME, LIBRISPEECH)
        raise DataError(
            f"unknown speech set {name!r}.{nearest(name, known)} There are {', '.join(known)}, or the path of a folder"
        )
    return load_folder(name, folder, splits, sample_rate, bins, skip_faulty)


def features_of(name: str, samples: Samples, sample_rate: int, bins: int) -> Features:
    """The features that a model which is trained on a set takes, made from audio, (T, F).

    Args:
        name: of the set, as `load_speech` takes it.
        samples: (N,), from -1 to 1, at least one window.
        sample_rate: in Hz.
        bins: mel bins.
    """
    return an4.an4_features(samples) if name == an4.NAME else audio_features(samples, sample_rate, bins)
