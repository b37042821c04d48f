"""What an encoder is worth while it is trained: classifiers of its frozen features, fitted anew each time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.tasks.contrast.nt_xent import gathered, place
from trimtab.tasks.contrast.probe import Probe, fit_probe, neighbour_votes
from trimtab.tasks.images.sets import ImageData


class Known(NamedTuple):
    """The training images whose labels are known, seen by the encoder as it is now.

    Attributes:
        features: (N, D).
        labels: (N,).
        probe: fitted to them.
    """

    features: Tensor
    labels: Tensor
    probe: Probe


Prepare = Callable[[nn.Module], Known]
Score = Callable[[nn.Module, tuple[Tensor, Tensor], Known], dict[str, Tensor]]


def evaluator(data: ImageData, bank: Tensor, batch_size: int) -> tuple[Prepare, Score]:
    """Make what `Task.prepare` and `Task.score` are of a model that returns features (B, D) first.

    Args:
        data: the set.
        bank: indices of the training images whose labels are known, (N,).
        batch_size: images in a forward of all processes.
    """

    def prepare(model: nn.Module) -> Known:
        features = _features(model, data, bank, batch_size)
        labels = data.train.labels[bank].to(features.device)
        return Known(features, labels, fit_probe(features, labels, data.num_classes))

    def score(model: nn.Module, batch: tuple[Tensor, Tensor], known: Known) -> dict[str, Tensor]:
        images, labels = batch
        features = model(data.standardize(images))[0].float()
        with torch.autocast(features.device.type, enabled=False):
            logits = known.probe.logits(features)
            votes = neighbour_votes(features, known.features, known.labels, data.num_classes)
        return {
            "probe_accuracy": _right(logits, labels),
            "knn_accuracy": _right(votes, labels),
            "eval_loss": F.cross_entropy(logits, labels, reduction="none"),
        }

    return prepare, score


def _features(model: nn.Module, data: ImageData, chosen: Tensor, batch_size: int) -> Tensor:
    """The features of some training images, (N, D), float32: each process makes its share, and all get the whole."""
    rank, processes = place()
    each = -(-len(chosen) // processes)
    own = torch.arange(rank * each, (rank + 1) * each).clamp(max=len(chosen) - 1)  # equally many forwards everywhere
    device = next(model.parameters()).device
    parts = [
        model(data.standardize(data.train.read(chosen[part], None).to(device)))[0].float()
        for part in own.split(max(1, batch_size // processes))
    ]
    return gathered(torch.cat(parts))[: len(chosen)]


def _right(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether the highest score is the label's, (B,); scores that are not finite count as wrong."""
    return ((scores.argmax(dim=1) == labels) & scores.isfinite().all(dim=1)).float()
