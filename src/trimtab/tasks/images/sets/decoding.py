"""From an image file to a square of RGB pixels: the random view of training, and the plain one of evaluation.

Views are made by Pillow, which lets other threads work meanwhile. Everything becomes 8-bit RGB: grey is repeated, the
first frame stands for an animation, what is transparent lies on white, 16 bits lose their lower eight, and a camera's
mark of how it was held (EXIF) is obeyed.
"""

import math
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trimtab.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

NUM_DRAWS = 41
"""Uniform random numbers that one training view takes: a flip, and four for each attempt at a crop."""

_ATTEMPTS, _SCALE, _RATIO = 10, (0.08, 1.0), (3 / 4, 4 / 3)
_RESIZE = 256 / 224  # of the evaluation: the shorter side over that of the crop
_ORIENTATION = 0x0112  # EXIF


def training_view(path: str | Path, side: int, draws: Sequence[float]) -> Pixels:
    """A random crop of 8 to 100 % of the area and a ratio of 3/4 to 4/3, resized, and flipped half of the time.

    This is the crop of Szegedy et al. (2015), "Going deeper with convolutions", as DeiT uses it.

    Args:
        path: of the file.
        side: of the view, pixels.
        draws: `NUM_DRAWS` numbers from 0 to 1, which decide it.

    Returns:
        (3, side, side).

    Raises:
        Exception: whatever Pillow raises at a file that is no image, or damaged.
    """
    from PIL import Image

    with Image.open(path) as image:
        turned = _orientation(image) != 1
        size = _upright_size(image)
        left, top, width, height = random_crop(*size, draws)
        shrunk = 1.0
        if not turned and (drafted := image.draft(None, _at_least(size, width, height, side))):
            # a JPEG decodes to 1/2, 1/4 or 1/8 of its size in a fraction of the time
            shrunk = size[0] / drafted[1][2]
        box = (left / shrunk, top / shrunk, (left + width) / shrunk, (top + height) / shrunk)
        view = np.asarray(_upright_rgb(image).resize((side, side), Image.Resampling.BICUBIC, box))
    view = view[:, ::-1] if draws[0] < 0.5 else view
    return view.transpose(2, 0, 1)


def evaluation_view(path: str | Path, side: int) -> Pixels:
    """Resized until the shorter side is 256/224 of the view's, then the centre of it, as most evaluate ImageNet.

    Args:
        path: of the file.
        side: of the view, pixels.

    Returns:
        (3, side, side).

    Raises:
        Exception: whatever Pillow raises at a file that is no image, or damaged.
    """
    from PIL import Image

    with Image.open(path) as image:
        whole = _upright_rgb(image)
    shorter, resized = min(whole.size), round(side * _RESIZE)
    shown = []
    for length in whole.size:
        longer = length * resized // shorter
        start = round((longer - side) / 2)
        shown.append((start * length / longer, (start + side) * length / longer))
    (left, right), (top, bottom) = shown
    # Only what the crop shows is resized, across and then down, which is Pillow's order for the whole image.
    across = whole.resize((side, whole.height), Image.Resampling.BICUBIC, (left, 0, right, whole.height))
    view = across.resize((side, side), Image.Resampling.BICUBIC, (0, top, side, bottom))
    return np.asarray(view).transpose(2, 0, 1)


def what_is_wrong(path: str | Path) -> str | None:
    """Decode a whole file, at the least size that it can be decoded to; what is wrong with it, or None.

    Reading only the header would take a tenth of the time, and miss files that are cut off.
    """
    from PIL import Image

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "not a file"  # a pipe would be waited for
        with Image.open(path) as image:
            image.draft(None, (1, 1))
            _rgb(image)
    except Exception as error:  # the decoders of many formats raise what they like
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """What went wrong with a file, in a few words and without its name.

    Raises:
        MemoryError: it was that: no fault of the file.
    """
    from PIL import UnidentifiedImageError

    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.splitlines()[0]


def random_crop(width: int, height: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop, pixels; where ten attempts do not fit, the largest one in the centre."""
    for attempt in range(_ATTEMPTS):
        scale, ratio, across, down = draws[1 + 4 * attempt : 5 + 4 * attempt]
        area = width * height * (_SCALE[0] + scale * (_SCALE[1] - _SCALE[0]))
        aspect = math.exp(math.log(_RATIO[0]) + ratio * math.log(_RATIO[1] / _RATIO[0]))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(across * (width - w + 1)), math.floor(down * (height - h + 1)), w, h
    w = min(width, max(1, round(height * _RATIO[1])))
    h = min(height, max(1, round(width / _RATIO[0])))
    return (width - w) // 2, (height - h) // 2, w, h


@cache
def threads() -> ThreadPoolExecutor:
    """The threads that decode: as many as this process has cores, which the processes of a machine share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def needs_pillow(name: str) -> None:
    """Refuse a set of image files where nothing can decode them.

    Raises:
        DataError: Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise DataError(f"{name} needs Pillow: pip install 'trimtab[lab]'") from None


def _at_least(size: tuple[int, int], width: int, height: int, side: int) -> tuple[int, int]:
    """The size of the whole at which the crop still has a pixel for each of the view's."""
    shrink = max(1, min(width, height) // side)
    return size[0] // shrink, size[1] // shrink


def _orientation(image: "Image") -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of a block that is no EXIF; the pixels may be good
        return 1


def _upright_size(image: "Image") -> tuple[int, int]:
    return image.size if _orientation(image) < 5 else (image.height, image.width)


def _upright_rgb(image: "Image") -> "Image":
    from PIL import ImageOps

    return _rgb(image if _orientation(image) == 1 else ImageOps.exif_transpose(image))


def _rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range")
    if image.mode.startswith("I"):  # convert() would clip what is over 255
        high = np.asarray(image).astype(np.int64) >> 8
        if high.max(initial=0) > 255 or high.min(initial=0) < 0:
            raise ValueError("its pixels have more than 16 bits")
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        white.alpha_composite(opaque)
        return white.convert("RGB")
    return image.convert("RGB")
