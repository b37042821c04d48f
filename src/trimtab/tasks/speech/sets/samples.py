"""Recordings that come with the data sets, to try a trained model on."""

import io
import lzma
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from trimtab.tasks.data import DATA_SETS, read_data
from trimtab.tasks.speech.features import Samples
from trimtab.tasks.speech.sets import digits
from trimtab.tasks.speech.sets.speech_data import one_spaced

_FILES = {
    "an4": "an4_wav40.npz.xz",
    "librivox-mini": "librivox_cards_10.npz.xz",
    "speech-commands-mini": "speech_commands_300.npz.xz",
    "yesno": "yesno.npz.xz",
}
SAMPLE_SETS = (digits.NAME, *_FILES)
"""Names of the sets that have recordings."""


class Sample(NamedTuple):
    """One recording.

    Attributes:
        name: which one it is.
        text: what is said.
        samples: (N,), from -1 to 1.
        sample_rate: in Hz.
    """

    name: str
    text: str
    samples: Samples
    sample_rate: int


def sample_recordings(name: str, count: int) -> list[Sample]:
    """The first recordings of a set: of fsdd, strings of its test recordings; of an4, its test recordings.

    Args:
        name: one of `SAMPLE_SETS`.
        count: how many, if there are as many.

    Raises:
        DataError: the set is missing or damaged.
    """
    return list(islice(_strings() if name == digits.NAME else _recordings(name), count))


def _strings() -> Iterator[Sample]:
    for name, text, samples in digits.strings(digits.recordings(), "test"):
        yield Sample(f"{digits.NAME}/{name}", text, samples, digits.SAMPLE_RATE)


def _recordings(name: str) -> Iterator[Sample]:
    stored: dict[str, Any] = dict(np.load(io.BytesIO(lzma.decompress(read_data(DATA_SETS[name], _FILES[name])))))
    own = {key.removeprefix("test_"): value for key, value in stored.items()}  # an4's are in two parts
    audio, offsets = own["audio"], own["offsets"]
    for i in range(len(offsets) - 1):
        samples = (audio[offsets[i] : offsets[i + 1]] / 32768).astype(np.float32)
        label = str(own.get("id", own.get("name", np.arange(len(offsets))))[i])
        yield Sample(f"{name}/{label}", one_spaced(_text(own, i)), samples, int(own["sample_rate"]))


def _text(own: dict[str, Any], i: int) -> str:
    if "text" in own:
        return str(own["text"][i])
    return " ".join(str(word) for word in own["words"][np.atleast_1d(own["label"][i])])
