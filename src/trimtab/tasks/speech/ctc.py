"""Connectionist temporal classification: its loss, what it can emit at all, and the best path."""

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch.nn.functional as F
from torch import Tensor

from trimtab.tasks.speech.labels import BLANK


def ctc_loss(logits: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Minus the logarithm of the probability of all alignments of each target together, in float32.

    Graves et al., "Connectionist Temporal Classification", ICML 2006, equation 8.

    Args:
        logits: (B, L, V); label 0 is the blank.
        lengths: (B,), int64, frames of each utterance.
        targets: (B, S), int64, labels of each, padded with anything.
        target_lengths: (B,), int64.

    Returns:
        (B,), nats; infinite where a target has no alignment (see `frames_needed`).
    """
    log_probabilities = logits.float().log_softmax(dim=-1).transpose(0, 1)  # (L, B, V)
    return F.ctc_loss(log_probabilities, targets, lengths, target_lengths, blank=BLANK, reduction="none")


def frames_needed(labels: Sequence[int]) -> int:
    """In how many frames CTC can emit labels: one for each, and a blank between two that are the same."""
    return len(labels) + sum(a == b for a, b in pairwise(labels))


def best_path(logits: Tensor, lengths: Tensor) -> list[list[int]]:
    """Greedy decoding: the best label of each frame, repeats merged, blanks left out.

    Args:
        logits: (B, L, V). An utterance with a logit that is not finite says nothing.
        lengths: (B,), frames of each utterance.

    Returns:
        The labels of each utterance.
    """
    finite = logits.isfinite().all(dim=-1)  # (B, L)
    best = logits.argmax(dim=-1)
    return [
        [label for label, _ in groupby(row[:length].tolist()) if label != BLANK] if ok[:length].all() else []
        for row, ok, length in zip(best.cpu(), finite.cpu(), lengths.tolist(), strict=True)
    ]
