"""Random images in the place of ImageNet's, for dry runs on machines that have no data."""

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import DataError
from trimtab.tasks.images.sets.image_data import ImageData, Split

FAKE = "fake-imagenet"
_CLASSES, _TRAIN, _TEST = 1000, 1_281_167, 50_000


def load_fake(name: str, side: int) -> ImageData:
    """As many random colour images as ImageNet has, 1,000 classes; the same image for the same index, always.

    Args:
        name: "fake-imagenet", or "fake-imagenet:64" for 64 images in each split.
        side: of an image, pixels.

    Raises:
        DataError: the number after the colon is none.
    """
    _, colon, count = name.partition(":")
    if colon and not (count.isdecimal() and int(count) > 0):
        raise DataError(f"expected {FAKE}:N with the number N of images in each split, got {name!r}")

    def split(size: int, first: int) -> Split:
        def read(indices: Tensor, _: torch.Generator | None) -> Tensor:
            bits = [np.random.SFC64(first + index) for index in indices.tolist()]
            # 64 random bits are 8 pixels; streams of bit generators are the same in every version of NumPy
            words = [each.random_raw(-(-3 * side * side // 8)) for each in bits]
            pixels = np.stack(words).view(np.uint8)[:, : 3 * side * side]
            return torch.from_numpy(pixels.reshape(-1, 3, side, side).copy())

        return Split(size, torch.arange(size) % _CLASSES, read)

    return ImageData(
        name=name,
        classes=tuple(f"class {number}" for number in range(_CLASSES)),
        channels=3,
        side=side,
        mean=torch.full((3, 1, 1), 127.5),
        std=torch.full((3, 1, 1), 73.9),  # of bytes that are equally likely: sqrt((256² - 1) / 12)
        train=split(int(count or _TRAIN), first=0),
        test=split(int(count or _TEST), first=_TRAIN),
    )
