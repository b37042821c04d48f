"""Batches of utterances: read, augmented, padded."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trimtab.tasks.speech.sets import SpeechData
from trimtab.tasks.speech.spec_augment import SpecAugment, spec_augment_


class SpeechBatch(NamedTuple):
    """Utterances, padded to the longest.

    Attributes:
        features: (B, T, F), float32.
        lengths: (B,), int64, frames of each.
        targets: (B, S), int64, labels of each.
        target_lengths: (B,), int64.
        indices: (B,), int64, which utterances of the set these are.
    """

    features: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    indices: Tensor


def make_batch(
    data: SpeechData,
    targets: Sequence[Tensor],
    indices: Tensor,
    augment: SpecAugment | None,
    generator: torch.Generator,
) -> SpeechBatch:
    """Read and pad utterances.

    Args:
        data: the set that they are of.
        targets: the labels of each utterance of the set.
        indices: which utterances, (B,), int64.
        augment: what is hidden of their features; None for nothing.
        generator: decides what is.
    """
    chosen = indices.tolist()
    lengths = data.frames[indices]
    features = torch.zeros(len(chosen), int(lengths.max()), data.in_features)
    for row, each in zip(features, data.read(chosen), strict=True):
        row[: len(each)] = torch.from_numpy(each)
        if augment is not None:
            spec_augment_(row[: len(each)], augment, generator)
    padded = nn.utils.rnn.pad_sequence([targets[i] for i in chosen], batch_first=True)
    return SpeechBatch(features, lengths, padded, torch.tensor([len(targets[i]) for i in chosen]), indices)


def weight(batch: SpeechBatch) -> Tensor:
    """Over how many characters the loss is a mean, (); at least 1, so that a batch without any has a loss, too."""
    return batch.target_lengths.sum().clamp(min=1)
