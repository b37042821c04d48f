"""Augmentation of image batches, on their device: crop, flip, RandAugment, erasing, mixup and CutMix.

Everything is drawn from torch's global random number generators, which checkpoints hold. kornia does the pictures, and
is imported only by what needs it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import RecipeError
from trimtab.tasks.images.rand_augment import LARGEST, rand_augment


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What is done to the images and labels of a training batch; nothing by default.

    Attributes:
        crop: pixels of black that an image gets on each side before a crop of its own size is cut out at random.
        flip: whether half of the images are mirrored, left to right.
        rand_augment: operations for an image, and their magnitude from 0 to 30 (Cubuk et al., arXiv 1909.13719); None
            for none. Grey images have no "color" operation.
        erasing: probability with which a rectangle of an image is set to the mean (Zhong et al., arXiv 1708.04896).
        mixup: alpha of mixup (Zhang et al., arXiv 1710.09412): an image is x of itself and 1 - x of another, as is its
            label, with x from Beta(alpha, alpha) for each image; 0 for none.
        cutmix: alpha of CutMix (Yun et al., arXiv 1905.04899): a rectangle of another image is laid over an image, and
            its label mixed by the share of pixels; 0 for none. With both, a coin decides for each batch.
        label_smoothing: share of the target that is spread evenly over all classes (Szegedy et al., arXiv 1512.00567).

    Raises:
        RecipeError: a field is out of range.
    """

    crop: int = 0
    flip: bool = False
    rand_augment: tuple[int, int] | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise RecipeError(f"augment.crop must be at least 0 pixels, got {self.crop}")
        if self.rand_augment is not None:
            operations, magnitude = self.rand_augment
            if operations < 1 or not 0 <= magnitude <= LARGEST:
                raise RecipeError(
                    f"augment.rand_augment must be at least 1 operation and a magnitude from 0 to {LARGEST}, got "
                    f"{operations} and {magnitude}"
                )
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RecipeError(f"augment.{name} must be a number, at least 0, got {getattr(self, name)}")
        for name in ("erasing", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"augment.{name} must be between 0 and 1, got {getattr(self, name)}")


Standardize = Callable[[Tensor], Tensor]
Augmented = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def augmentation(augment: Augment, standardize: Standardize, side: int, num_classes: int) -> Augmented:
    """Make the function that augments a batch.

    Args:
        augment: what is to be done.
        standardize: from images (B, C, side, side), uint8 or float32 from 0 to 255, to standardised ones, float32.
        side: of an image, in pixels.
        num_classes: K.

    Returns:
        A function from images (B, C, side, side), uint8, and labels (B,), int64, to standardised images, float32, and
        what `torch.nn.functional.cross_entropy` takes as the target: the labels, or where labels are mixed their
        shares, (B, K), float32. No gradient goes through it, and it is float32 under autocast, too.

    Raises:
        RecipeError: kornia is needed, and not installed; or a crop does not fit the image.
    """
    if augment.crop >= side:
        raise RecipeError(f"augment.crop must be below the image's side of {side} pixels, got {augment.crop}")
    move = _pixels(augment, side)
    erase = _kornia().RandomErasing(p=augment.erasing) if augment.erasing else None  # zero is the mean by then
    cut = None
    if augment.cutmix:
        # without `use_correct_lambda` kornia gives the label of the rectangle the weight of the rest
        cut = _kornia().RandomCutMixV2(beta=augment.cutmix, data_keys=["input", "class"], use_correct_lambda=True)

    @torch.no_grad()
    def augmented(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            images = standardize(images if move is None else move(images))
            if erase is not None:
                images = erase(images)
            if cut is not None and not (augment.mixup and torch.rand(()) < 0.5):
                images, mixed = cut(images, labels)
                own, other, share = mixed[0].unbind(1)  # (1, B, 3); the share is that of an image's own label
                return images, _shares(own.long(), other.long(), share, num_classes)
            if augment.mixup:
                return mixup(images, labels, augment.mixup, num_classes)
            return images, labels

    return augmented


def mixup(images: Tensor, labels: Tensor, alpha: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix each image, and its label, with another of the batch: Zhang et al., arXiv 1710.09412, equation (2).

    Our own, because kornia draws the shares evenly, which is the paper's for alpha = 1 only.

    Args:
        images: (B, C, side, side), float32.
        labels: (B,), int64.
        alpha: of the distribution Beta(alpha, alpha) of the shares.
        num_classes: K.

    Returns:
        The mixed images, and the shares of the classes, (B, K), float32.
    """
    share = torch.distributions.Beta(alpha, alpha).sample((len(images),)).to(images)  # (B,)
    other = torch.randperm(len(images)).to(images.device)
    mixed = torch.lerp(images[other], images, share[:, None, None, None])
    return mixed, _shares(labels, labels[other], share, num_classes)


def _shares(labels: Tensor, others: Tensor, share: Tensor, num_classes: int) -> Tensor:
    """Of two labels (B,) and the share (B,) of the first, the shares of all classes, (B, K)."""
    own, other = (F.one_hot(each, num_classes).to(share) for each in (labels, others))  # (B, K)
    return torch.lerp(other, own, share[:, None])


def _pixels(augment: Augment, side: int) -> Callable[[Tensor], Tensor] | None:
    """From uint8 images to float32 ones from 0 to 255, cropped, flipped and changed; None for nothing to do."""
    steps: list[Callable[[Tensor], Tensor]] = []
    if augment.crop:
        steps.append(_kornia().RandomCrop((side, side), padding=augment.crop))
    if augment.flip:
        steps.append(_kornia().RandomHorizontalFlip())
    if augment.rand_augment is not None:
        _kornia()
        operations, magnitude = augment.rand_augment
        steps.append(lambda images: rand_augment(images, operations, magnitude))
    if not steps:
        return None

    def moved(images: Tensor) -> Tensor:
        images = images / 255  # kornia's pictures are from 0 to 1
        for step in steps:
            images = step(images)
        return images * 255

    return moved


def _kornia() -> Any:
    try:
        import kornia.augmentation
    except ImportError:
        raise RecipeError("augment needs the package kornia, which is missing: pip install 'trimtab[lab]'") from None
    return kornia.augmentation
