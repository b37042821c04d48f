"""Folders of image files, as ImageNet is kept: train/CLASS/... and val/CLASS/..., decoded as they are needed."""

import logging
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import DataError
from trimtab.tasks.data.folder import IMAGENET
from trimtab.tasks.data.prepare import Arrays, prepared
from trimtab.tasks.images.sets.decoding import (
    NUM_DRAWS,
    Pixels,
    evaluation_view,
    needs_pillow,
    reason,
    threads,
    training_view,
)
from trimtab.tasks.images.sets.image_data import ImageData, Split
from trimtab.tasks.images.sets.listing import Listing, list_images, shown
from trimtab.tasks.images.sets.packed import moments
from trimtab.tasks.images.sets.unreadable import Unreadable, find_unreadable, refuse, warn_of_skipped

# of ImageNet's training images, as everyone rounds them
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SAMPLE = 1024  # training images that the mean and deviation of another folder are measured on

_log = logging.getLogger("trimtab")


def load_folder(name: str, folder: Path, side: int, skip_unreadable: bool) -> ImageData:
    """Load a folder of images.

    Args:
        name: of the set.
        folder: holds train/ and val/.
        side: of the views, pixels.
        skip_unreadable: leave out files that cannot be read, with a warning, instead of refusing the folder.

    Raises:
        DataError: the folder is not there or not made like that; files of it cannot be read; or there is no Pillow.
    """
    needs_pillow(shown(name))
    if name == IMAGENET and not folder.exists():
        raise DataError(
            f"{shown(folder)} is missing: ImageNet is given out by image-net.org only, after you agree to its terms. "
            "Put or link its images there, as train/CLASS/*.JPEG and val/CLASS/*.JPEG"
        )
    listings = list_images(folder)
    train, test = listings
    found = find_unreadable(_cache_name(folder), listings)
    bad = [(listings[i].path(index), why) for i in (0, 1) for index, why in found[i].items()]
    if bad and not skip_unreadable:
        raise refuse(f"{_cache_name(folder)}-{train.fingerprint[:16]}", folder, bad)
    if _tells():
        if bad:
            warn_of_skipped(folder, bad)
        _warn_of_strays(folder, listings)
    train_split, test_split = _split(train, found[0], side), _split(test, found[1], side)
    mean, std = _imagenet_moments() if name == IMAGENET else _measured_moments(train_split, train, folder, side)
    return ImageData(
        name=name,
        classes=train.classes,
        channels=3,
        side=side,
        mean=mean,
        std=std,
        train=train_split,
        test=test_split,
        unreadable=tuple(shown(path.relative_to(folder)) for path, _ in bad),
    )


def _split(listing: Listing, unreadable: Unreadable, side: int) -> Split:
    good = np.setdiff1d(np.arange(len(listing.labels)), list(unreadable))  # (N,), in order
    labels = listing.labels[good]
    without = np.setdiff1d(np.arange(len(listing.classes)), labels)
    if len(without):
        raise DataError(
            f"none of the images of class {shown(listing.classes[without[0]])} in {shown(listing.folder)} can be read"
        )

    def read(indices: Tensor, generator: torch.Generator | None) -> Tensor:
        # All random numbers are drawn here, so that it does not matter which thread decodes what.
        draws = None if generator is None else torch.rand(len(indices), NUM_DRAWS, generator=generator).tolist()
        images = np.empty((len(indices), 3, side, side), np.uint8)

        def decode(place: int) -> None:
            path = listing.path(int(good[indices[place]]))
            images[place] = _view(path, side, draws and draws[place])

        for _ in threads().map(decode, range(len(indices))):
            pass
        return torch.from_numpy(images)

    return Split(len(good), torch.from_numpy(labels), read)


def _view(path: Path, side: int, draws: list[float] | None) -> Pixels:
    try:
        return evaluation_view(path, side) if draws is None else training_view(path, side, draws)
    except Exception as error:  # the decoders of many formats raise what they like
        raise DataError(
            f"{shown(path)} cannot be read any more ({reason(error)}): it was whole when the folder was looked at"
        ) from error


def _imagenet_moments() -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor([_IMAGENET_MEAN, _IMAGENET_STD]).mul(255)[..., None, None]  # (2, 3, 1, 1)
    return mean, std


def _measured_moments(train: Split, listing: Listing, folder: Path, side: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the evaluation views of some training images, spread evenly over the classes."""

    def make() -> Arrays:
        sample = torch.linspace(0, train.size - 1, min(_SAMPLE, train.size)).long()
        mean, std = moments(train.read(sample, None).numpy())
        return {"mean": mean, "std": std}

    sources = ["moments 1", listing.fingerprint, str(train.size), str(side)]
    arrays = prepared(f"{_cache_name(folder)}-moments", sources, make)
    return torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["std"])


def _warn_of_strays(folder: Path, listings: tuple[Listing, Listing]) -> None:
    strays = [f"{listing.folder.name}/{stray}" for listing in listings for stray in listing.strays]
    if strays:
        _log.warning(
            "%s: passed over %s that %s no image by the suffix: %s%s",
            shown(folder),
            "1 file" if len(strays) == 1 else f"{len(strays):,} files",
            "is" if len(strays) == 1 else "are",
            shown(", ".join(strays[:3])),
            ", …" if len(strays) > 3 else "",
        )


def _cache_name(folder: Path) -> str:
    return shown(folder.resolve().name)[:60] or "folder"


def _tells() -> bool:
    """Whether this process is the one that tells: the first of several."""
    return os.environ.get("RANK", "0") == "0"
