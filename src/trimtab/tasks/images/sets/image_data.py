"""What an image data set is: `ImageData`, and its two `Split`s."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Read = Callable[[Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class Split:
    """The training or the test images of a set.

    Attributes:
        size: how many there are, N.
        labels: (N,), int64, from 0 to num_classes - 1.
        read: from indices (B,), int64, and a generator or None to images (B, C, side, side), uint8, on the CPU.
            Without a generator it is the view for evaluation. With one, images of a folder are cropped and flipped at
            random, the same for the same state of the generator; sets held in memory ignore it.
        images: (N, C, side, side), uint8, of a set held in memory; None for others.
    """

    size: int
    labels: Tensor
    read: Read
    images: Tensor | None = None


@dataclass(frozen=True)
class ImageData:
    """One image classification set, split into training and test.

    Attributes:
        name: the name it was loaded by.
        classes: the names of the classes; a label is an index into them.
        channels: of an image, C.
        side: height and width of an image, pixels.
        mean: (C, 1, 1), float32, of the training pixels, in their own units.
        std: (C, 1, 1), float32, likewise.
        train: the training images.
        test: the test images.
        unreadable: files of a folder that cannot be read and were left out, as asked for.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    side: int
    mean: Tensor
    std: Tensor
    train: Split
    test: Split
    unreadable: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def standardize(self, images: Tensor) -> Tensor:
        """Make uint8 images (B, C, height, width) float32, on their own device: mean 0, deviation 1 over the set."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return (images - mean).div_(std)  # in place: a third of the time of two new tensors


def fixed_order(size: int) -> Tensor:
    """The indices of a set, (size,), in an order that looks random and is always the same: what is held out is."""
    # RandomState's stream is frozen for good, so it is the same with every version of NumPy
    return torch.from_numpy(np.random.RandomState(0).permutation(size))
