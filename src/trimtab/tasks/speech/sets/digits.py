"""Connected digits: 3 to 7 recordings of the Free Spoken Digit Dataset, of one speaker, one after the other."""

import io
import lzma
from collections.abc import Iterator

import numpy as np
import torch

from trimtab.errors import RecipeError
from trimtab.tasks.data import DATA_SETS, prepared, read_data
from trimtab.tasks.data.prepare import Arrays
from trimtab.tasks.speech.audio_files import audio_features
from trimtab.tasks.speech.features import Samples
from trimtab.tasks.speech.sets.speech_data import SpeechData, in_memory, lengths_of

NAME = "fsdd"
SAMPLE_RATE = 8000
_FILE = "fsdd.npz.xz"
_FORMAT = "fsdd strings 1"
# Recordings of each digit and speaker by their index; 0 to 4 are the set's own test recordings.
_SPLITS = {"train": range(5, 45), "validation": range(45, 50), "test": range(5)}
_PASSES = {"train": 4, "validation": 2, "test": 2}
"""In how many strings each recording is."""
_SHORTEST, _LONGEST = 3, 7  # digits
_PAUSE = 0.2  # longest, seconds
_NOISE = 3e-4  # standard deviation in the pauses: ten steps of 16-bit audio


def load_digits(sample_rate: int, bins: int) -> SpeechData:
    """Load the strings: their transcripts are digits with spaces between, as "3 1 4". They are always the same.

    Args:
        sample_rate: must be that of the recordings, 8,000 Hz.
        bins: mel bins.

    Raises:
        DataError: the file is missing or damaged, or there are too many bins.
        RecipeError: the sample rate is another.
    """
    if sample_rate != SAMPLE_RATE:
        raise RecipeError(f"{NAME} is audio of {SAMPLE_RATE} Hz, the recipe has {sample_rate}: --sample-rate 8000")
    checksum = next(file.sha256 for file in DATA_SETS[NAME].files if file.path.endswith(_FILE))
    arrays = prepared(f"{NAME}-strings", [_FORMAT, checksum, str(bins)], lambda: _make(bins))
    train, validation, test = (torch.from_numpy(arrays["splits"] == each).nonzero().flatten() for each in _SPLITS)
    return SpeechData(
        name=NAME,
        in_features=bins,
        names=tuple(str(name) for name in arrays["names"]),
        texts=tuple(str(text) for text in arrays["texts"]),
        frames=lengths_of(arrays["offsets"]),
        read=in_memory(arrays["features"], arrays["offsets"]),
        train=train,
        validation=validation,
        test=test,
    )


def recordings() -> Arrays:
    """The arrays of the set's file.

    Raises:
        DataError: the file is missing or damaged.
    """
    return dict(np.load(io.BytesIO(lzma.decompress(read_data(DATA_SETS[NAME], _FILE)))))


def strings(stored: Arrays, split: str) -> Iterator[tuple[str, str, Samples]]:
    """The strings of "train", "validation" or "test" from `recordings`: of each its name, transcript and audio."""
    audio, offsets = stored["audio"], stored["offsets"]
    # RandomState's stream is frozen for good, so it is the same with every version of NumPy
    draw = np.random.RandomState(list(_SPLITS).index(split))
    for speaker, name in enumerate(stored["speakers"]):
        own = np.flatnonzero((stored["speaker"] == speaker) & np.isin(stored["index"], list(_SPLITS[split])))
        order = np.concatenate([draw.permutation(own) for _ in range(_PASSES[split])])
        number = 0
        while len(order) >= _SHORTEST:  # at most two are left over
            count = min(draw.randint(_SHORTEST, _LONGEST + 1), len(order))
            chosen, order = order[:count], order[count:]
            pieces = []
            for i in chosen:
                pause = draw.randint(0, int(_PAUSE * SAMPLE_RATE) + 1)
                pieces += [audio[offsets[i] : offsets[i + 1]] / 32768, _NOISE * draw.standard_normal(pause)]
            text = " ".join(str(stored["label"][i]) for i in chosen)
            yield f"{split}-{name}-{number}", text, np.concatenate(pieces[:-1]).astype(np.float32)
            number += 1


def _make(bins: int) -> Arrays:
    stored = recordings()
    made = [(split, *each) for split in _SPLITS for each in strings(stored, split)]
    features = [audio_features(samples, SAMPLE_RATE, bins) for *_, samples in made]
    return {
        "features": np.concatenate(features),
        "offsets": np.cumsum([0, *map(len, features)]),
        "splits": np.array([split for split, *_ in made]),
        "names": np.array([name for _, name, *_ in made]),
        "texts": np.array([text for _, _, text, _ in made]),
    }
