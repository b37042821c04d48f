"""SpecAugment: bands of features and stretches of time are hidden in training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import RecipeError


@dataclass(frozen=True)
class SpecAugment:
    """How much is hidden (Park et al., Interspeech 2019, arXiv 1904.08779; without its warping of time).

    Attributes:
        freq_masks: bands of neighbouring features that are hidden in an utterance.
        freq_width: largest width of each, features (the paper's F); its width is drawn from 0 to this.
        time_masks: stretches of neighbouring frames that are hidden.
        time_width: largest length of each, frames (the paper's T).
        time_share: no stretch is longer than this share of the utterance (the paper's p).

    Raises:
        RecipeError: a field is out of range.
    """

    freq_masks: int = 0
    freq_width: int = 0
    time_masks: int = 0
    time_width: int = 0
    time_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("freq_masks", "freq_width", "time_masks", "time_width"):
            if getattr(self, name) < 0:
                raise RecipeError(f"augment.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.time_share <= 1:
            raise RecipeError(f"augment.time_share must be from 0 to 1, got {self.time_share}")


def spec_augment_(features: Tensor, config: SpecAugment, generator: torch.Generator) -> Tensor:
    """Hide parts of one utterance in place: they become 0, the mean of normalised features.

    Args:
        features: (T, F), normalised.
        config: how much.
        generator: draws as many numbers whatever the utterance.
    """
    frames, bins = features.shape
    draws = torch.rand(config.freq_masks + config.time_masks, 2, generator=generator).tolist()
    for number, (first, second) in enumerate(draws):
        if number < config.freq_masks:
            start, stop = _band(first, second, bins, min(config.freq_width, bins))
            features[:, start:stop] = 0
        else:
            longest = min(config.time_width, int(config.time_share * frames))
            start, stop = _band(first, second, frames, longest)
            features[start:stop] = 0
    return features


def _band(first: float, second: float, size: int, widest: int) -> tuple[int, int]:
    """A band of 0 to `widest` of `size` places, and anywhere among them, from two numbers of [0, 1)."""
    width = int(first * (widest + 1))
    start = int(second * (size - width + 1))
    return start, start + width
