"""Image data sets by name: handwritten digits inside the package, Fashion-MNIST and CIFAR-10 in the data folder.

Every file is checked against its sha256 before it is read, so a damaged copy is an error and never a slightly different
experiment. What is decoded from the data folder is kept in the cache, where the next run finds it memory-mapped.
"""

import gzip
import hashlib
import io
import itertools
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import DataError
from trimtab.tasks.data.folder import read_data
from trimtab.tasks.data.prepare import Arrays, prepared
from trimtab.tasks.data.table import DATA_SETS
from trimtab.words import nearest

_DIGITS_SHA256 = "56691635b5c95f315ed55907c4fe83309809b3b822ee0b8d68e84bba3ffd4ca3"
_FORMAT = "images 1"  # changes with what is made of the files here


@dataclass(frozen=True)
class ImageData:
    """One image classification set, split into training and test.

    Attributes:
        name: the name it was loaded by.
        train_images: (N, C, height, width), uint8.
        train_labels: (N,), int64, from 0 to num_classes - 1.
        test_images: (M, C, height, width), uint8.
        test_labels: (M,), int64.
        num_classes: how many classes there are.
        mean: (C, 1, 1), float32, of the training pixels, in their own units.
        std: (C, 1, 1), float32, likewise.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor

    def standardize(self, images: Tensor) -> Tensor:
        """Make uint8 images (B, C, height, width) float32: mean 0, deviation 1 over the training set."""
        return (images - self.mean).div_(self.std)  # in place: a third of the time of two new tensors


def load_images(name: str) -> ImageData:
    """Load a data set by name.

    Args:
        name: "digits" (1,437 + 360 grey images of 8×8; ships with the package), "fashion-mnist"
            (60,000 + 10,000 grey images of 28×28) or "cifar10" (50,000 + 10,000 colour images of 32×32, from
            JPEG copies, so pixels differ slightly from the original set's). The last two are read from the data
            folder, see `trimtab.tasks.data`.

    Returns:
        The whole set, memory-mapped if it comes from the data folder.

    Raises:
        DataError: the name is unknown, the folder or a file in it is missing or damaged, or there is no
            Pillow.
    """
    if name not in _READERS:
        raise DataError(f"unknown image data set {name!r}.{nearest(name, _READERS)} There are: {', '.join(_READERS)}")
    read = _READERS[name]

    def make() -> Arrays:
        return _arrays(name, *read())

    if name in DATA_SETS:
        arrays = prepared(name, [_FORMAT, *(file.sha256 for file in DATA_SETS[name].files)], make)
    else:
        arrays = make()
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return ImageData(name=name, num_classes=int(tensors["train_labels"].max()) + 1, **tensors)


Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
_Part = tuple[Bytes, Bytes]  # images (N, C, height, width), labels (N,)


def _arrays(name: str, train: _Part, test: _Part) -> Arrays:
    """Everything of an `ImageData` that is an array."""
    for part, (images, labels) in (("training", train), ("test", test)):
        if not 0 < len(images) == len(labels):
            raise DataError(f"{name} has {len(images):,} {part} images and {len(labels):,} labels for them")
    mean, std = _moments(train[0])
    return {
        "train_images": train[0],
        "train_labels": train[1].astype(np.int64),
        "test_images": test[0],
        "test_labels": test[1].astype(np.int64),
        "mean": mean,
        "std": std,
    }


def _digits() -> tuple[_Part, _Part]:
    path = Path(__file__).with_name("digits.npz")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != _DIGITS_SHA256:
        raise DataError(f"{path} is damaged: install trimtab again")
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        images, labels = archive["images"][:, None], archive["labels"]  # (1797, 1, 8, 8), (1797,)
    # RandomState's stream is frozen for good, so the split is the same with every version of NumPy
    order = np.random.RandomState(0).permutation(len(labels))
    test, train = order[:360], order[360:]
    return (images[train], labels[train]), (images[test], labels[test])


def _fashion_mnist() -> tuple[_Part, _Part]:
    def part(prefix: str) -> _Part:
        images = gzip.decompress(read_data(DATA_SETS["fashion-mnist"], f"{prefix}-images-idx3-ubyte.gz"))
        labels = gzip.decompress(read_data(DATA_SETS["fashion-mnist"], f"{prefix}-labels-idx1-ubyte.gz"))
        # the IDX headers are 16 and 8 bytes; copied because a view of bytes is read-only
        return (
            np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy(),
            np.frombuffer(labels, np.uint8, offset=8).copy(),
        )

    return part("train"), part("t10k")


def _cifar10() -> tuple[_Part, _Part]:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("cifar10 is stored as JPEG and needs Pillow: pip install 'trimtab[lab]'") from None
    content = lzma.decompress(read_data(DATA_SETS["cifar10"], "cifar10_full_jpeg.npz.xz"))
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:

        def part(prefix: str) -> _Part:
            joined, offsets = archive[f"{prefix}_jpeg"], archive[f"{prefix}_offsets"]
            images = np.empty((len(offsets) - 1, 3, 32, 32), np.uint8)
            for index, (start, end) in enumerate(itertools.pairwise(offsets)):
                picture = Image.open(io.BytesIO(joined[start:end].tobytes()))
                images[index] = np.asarray(picture).transpose(2, 0, 1)  # (32, 32, 3) -> (3, 32, 32)
            return images, archive[f"{prefix}_y"]

        return part("train"), part("test")


_READERS: dict[str, Callable[[], tuple[_Part, _Part]]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
}


def _moments(images: Bytes) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each channel, (C, 1, 1); exact, because bytes can be counted."""
    values = np.arange(256)
    moments = []
    for channel in images.swapaxes(0, 1):  # (N, height, width)
        # in parts, because bincount works on an eight times larger copy
        counts = sum(np.bincount(part.ravel(), minlength=256) for part in np.array_split(channel, 64))
        mean = np.average(values, weights=counts)
        moments.append((mean, np.sqrt(np.average((values - mean) ** 2, weights=counts))))
    mean, std = np.array(moments, dtype=np.float32).T[..., None, None]  # (2, C, 1, 1)
    return mean.copy(), std.copy()
