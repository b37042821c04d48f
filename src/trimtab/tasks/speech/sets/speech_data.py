"""What a speech set is: `SpeechData`, utterances with their transcripts, parted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.tasks.speech.features import Features

Read = Callable[[Sequence[int]], list[Features]]


@dataclass(frozen=True)
class SpeechData:
    """Utterances and their transcripts.

    Attributes:
        name: the name it was loaded by.
        in_features: features F of a frame.
        names: of each of N utterances, as errors and counts tell them.
        texts: the transcript of each; words are separated by single spaces.
        frames: (N,), int64, frames of each, at least 1.
        read: from indices of utterances to the features of each, (T, F), float32, normalised over the utterance.
        train: (n,), int64, which utterances are for training.
        validation: which choose among settings, likewise.
        test: which are measured at the end, likewise.
        counts: how many of what needs to be known of were found, by what it is: files left out, silent recordings ...
    """

    name: str
    in_features: int
    names: tuple[str, ...]
    texts: tuple[str, ...]
    frames: Tensor
    read: Read
    train: Tensor
    validation: Tensor
    test: Tensor
    counts: Mapping[str, int] = field(default_factory=dict)


def in_memory(features: np.ndarray[Any, np.dtype[np.float32]], offsets: np.ndarray[Any, np.dtype[np.int64]]) -> Read:
    """Make the `read` of features that are joined: utterance i is features[offsets[i]:offsets[i + 1]]."""

    def read(indices: Sequence[int]) -> list[Features]:
        return [features[offsets[i] : offsets[i + 1]] for i in indices]

    return read


def lengths_of(offsets: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
    """The length of each item of joined ones, (N,), int64."""
    return torch.from_numpy(np.diff(offsets).astype(np.int64))


def one_spaced(text: str) -> str:
    """A transcript with single spaces between its words, and none around."""
    return " ".join(text.split())


def first_few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
