"""Random views of images: what a pair of them has in common is what contrastive learning learns.

The random numbers are torch's global ones, whose state checkpoints hold: a run that goes on sees the same views.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trimtab.errors import DataError

_SMALL = 64  # pixels; below, as for CIFAR-10 (appendix B.9), no blur and half the colour jitter; larger crops are ours


def view_maker(channels: int, side: int) -> Callable[[Tensor], Tensor]:
    """Make what draws one random view of each image.

    Colour images get the views of SimCLR (Chen et al., arXiv 2002.05709, appendix A): crop, flip, colour jitter, grey,
    blur; below 64 pixels as for CIFAR-10, without blur and with half the jitter, but crops of at least a fifth of the
    image. Grey ones have no colour to jitter: crop, flip, small rotation, light, and a part that is erased.

    Args:
        channels: 3, or 1 for grey.
        side: height and width, pixels.

    Returns:
        From images (B, C, side, side), uint8, to views of the same shape, float32 from 0 to 1, on their device and
        without gradients; also under autocast.

    Raises:
        DataError: there is no policy for so many channels, or no kornia.
    """
    if channels not in (1, 3):
        raise DataError(f"views are made of grey images or of three colours, got {channels} channels")
    try:
        import kornia.augmentation as K
    except ImportError:
        raise DataError("views of images are made by kornia, which is missing: pip install 'trimtab[lab]'") from None
    small = side < _SMALL
    # "resample": crops and scales all images of a batch in one call, where "slice" takes one after the other
    crop = K.RandomResizedCrop((side, side), scale=(0.2 if small else 0.08, 1.0), cropping_mode="resample")
    if channels == 1:
        rest: list[nn.Module] = [
            K.RandomRotation(15.0, p=0.5),
            K.RandomContrast((0.4, 1.6), p=0.8),  # kornia's multiplies: what is black stays so
            K.RandomErasing(scale=(0.02, 0.2), p=0.5),
        ]
    else:
        strength = 0.5 if small else 1.0
        jitter = (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        rest = [K.ColorJitter(*jitter, p=0.8), K.RandomGrayscale(p=0.2)]
        if not small:
            width = side // 20 * 2 + 1  # a tenth of the side, odd
            rest.append(K.RandomGaussianBlur((width, width), (0.1, 2.0), p=0.5))
    policy = nn.Sequential(crop, K.RandomHorizontalFlip(), *rest)

    @torch.no_grad()
    def view(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            views: Tensor = policy(images.float() / 255)
        return views.clamp_(0, 1)

    return view
