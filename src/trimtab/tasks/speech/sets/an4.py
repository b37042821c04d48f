"""CMU AN4: 948 + 130 short sentences, spelled names and numbers; it comes as 13 mel cepstra a frame, not as audio."""

import io
import lzma
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from trimtab.errors import RecipeError
from trimtab.tasks.data import DATA_SETS, prepared, read_data
from trimtab.tasks.data.prepare import Arrays
from trimtab.tasks.speech.cepstra import SAMPLE_RATE, cepstra
from trimtab.tasks.speech.features import Features, Samples, normalized, with_deltas
from trimtab.tasks.speech.sets.speech_data import SpeechData, in_memory, lengths_of, one_spaced

NAME = "an4"
HELD_OUT_SPEAKERS = 8
"""Of the 74 training speakers. The test speakers are the corpus's own ten, none of whom is among the 74."""
_FILE = "an4_mfcc.npz.xz"
_FORMAT = "an4 cepstra 1"


def load_an4(sample_rate: int) -> SpeechData:
    """Load the corpus: cepstra with their first and second time derivatives, 39 features, each normalised.

    Args:
        sample_rate: must be that of the audio behind the cepstra, 16,000 Hz.

    Raises:
        DataError: the file is missing or damaged.
        RecipeError: the sample rate is another.
    """
    if sample_rate != SAMPLE_RATE:
        raise RecipeError(
            f"{NAME} is from audio of {SAMPLE_RATE} Hz, the recipe has {sample_rate}: --sample-rate 16000"
        )
    checksum = next(file.sha256 for file in DATA_SETS[NAME].files if file.path.endswith(_FILE))
    arrays = prepared(NAME, [_FORMAT, checksum], _make)
    speakers, test = arrays["speakers"], torch.from_numpy(arrays["is_test"])
    # RandomState's stream is frozen for good, so it is the same with every version of NumPy
    held_out = np.random.RandomState(0).permutation(np.unique(speakers[~arrays["is_test"]]))[:HELD_OUT_SPEAKERS]
    validation = torch.from_numpy(np.isin(speakers, held_out)) & ~test
    return SpeechData(
        name=NAME,
        in_features=arrays["features"].shape[1],
        names=tuple(str(name) for name in arrays["names"]),
        texts=tuple(str(text) for text in arrays["texts"]),
        frames=lengths_of(arrays["offsets"]),
        read=in_memory(arrays["features"], arrays["offsets"]),
        train=(~test & ~validation).nonzero().flatten(),
        validation=validation.nonzero().flatten(),
        test=test.nonzero().flatten(),
    )


def an4_features(samples: Samples) -> Features:
    """The features that the corpus's own cepstra give, made from audio of 16 kHz, (T, 39)."""
    return normalized(with_deltas(cepstra(samples)))


def _make() -> Arrays:
    stored: dict[str, Any] = dict(np.load(io.BytesIO(lzma.decompress(read_data(DATA_SETS[NAME], _FILE)))))
    features = []
    for split in ("train", "test"):
        joined, offsets = stored[f"{split}_mfcc"], stored[f"{split}_offsets"]
        features += [normalized(with_deltas(joined[a:b])) for a, b in pairwise(offsets)]
    texts = np.array([one_spaced(text) for split in ("train", "test") for text in stored[f"{split}_text"]])
    return {
        "features": np.concatenate(features),
        "offsets": np.cumsum([0, *map(len, features)]),
        "texts": texts,
        "names": np.concatenate([stored["train_id"], stored["test_id"]]),
        "speakers": np.concatenate([stored["train_speaker"], stored["test_speaker"]]),
        "is_test": np.arange(len(texts)) >= len(stored["train_text"]),
    }
