"""RandAugment: a few operations for each image, drawn at random, all of one magnitude.

Cubuk et al., arXiv 1909.13719: its fourteen operations, in the ranges of AutoAugment (arXiv 1805.09501, table 6). The
larger the magnitude, the further an operation is from the identity, to either side where it has two, as in DeiT's code;
in the authors' code the colours go from one end of their ranges to the other.

kornia makes the pictures, but its own RandAugment is not used: its brightness adds to all pixels, so that a large
magnitude leaves them white, its contrast is what others call brightness, and it draws operations for a whole batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST = 30
"""Magnitude at the end of the ranges."""

Operation = Callable[[Tensor, Tensor], Tensor]
"""From images (B, C, side, side), from 0 to 1, and levels (B,), from -1 to 1, to images. 0 is the identity."""


def rand_augment(images: Tensor, operations: int, magnitude: int) -> Tensor:
    """Change each image by operations of its own, one after the other.

    Args:
        images: (B, C, side, side), from 0 to 1; of at least 3 pixels a side.
        operations: for each image.
        magnitude: 0 to 30.

    Returns:
        The changed images, likewise.
    """
    known = _operations(colour=images.shape[1] == 3)
    images = images.clone()
    for _ in range(operations):
        # drawn on the CPU: nothing waits for a GPU to tell how many images each operation has
        chosen = torch.randint(len(known), (len(images),))  # (B,)
        levels = magnitude / LARGEST * (2 * torch.randint(2, (len(images),)) - 1)  # (B,)
        for number, operation in enumerate(known):
            which = (chosen == number).nonzero().flatten()
            if len(which):
                level, which = levels[which].to(images), which.to(images.device)
                images[which] = operation(images[which], level)
    return images


def _operations(colour: bool) -> list[Operation]:
    """The operations of the paper; without "color" for grey images."""
    from kornia import enhance
    from kornia.geometry import transform

    def enhanced(function: Callable[[Tensor, Tensor], Tensor]) -> Operation:
        return lambda images, level: function(images, 1 + 0.9 * level)  # a factor from 0.1 to 1.9

    def across(level: Tensor) -> Tensor:
        return torch.stack([level, torch.zeros_like(level)], dim=1)  # (B, 2), in x and y

    def down(level: Tensor) -> Tensor:
        return across(level).flip(1)

    def shear(images: Tensor, slope: Tensor) -> Tensor:
        return transform.shear(images, 0.3 * slope, align_corners=True)

    def translate(images: Tensor, shift: Tensor) -> Tensor:
        return transform.translate(images, 150 / 331 * images.shape[-1] * shift)  # pixels of the paper's images

    found: list[Operation] = [
        lambda images, _: images,
        lambda images, _: _auto_contrast(images),
        lambda images, _: enhance.equalize(images),
        lambda images, level: transform.rotate(images, 30 * level),  # degrees
        lambda images, level: enhance.solarize(images, 256 / 255 * (1 - level.abs())),  # from 256 on none is inverted
        lambda images, level: enhance.posterize(images, (8 - 4 * level.abs()).round().int()),  # bits
        enhanced(enhance.adjust_contrast_with_mean_subtraction),
        enhanced(enhance.adjust_brightness_accumulative),
        enhanced(enhance.sharpness),
        lambda images, level: shear(images, across(level)),
        lambda images, level: shear(images, down(level)),
        lambda images, level: translate(images, across(level)),
        lambda images, level: translate(images, down(level)),
    ]
    return [*found, enhanced(enhance.adjust_saturation_with_gray_subtraction)] if colour else found


def _auto_contrast(images: Tensor) -> Tensor:
    """Each channel from 0 to 1; one of a single value stays, where kornia makes it black."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low), images)
