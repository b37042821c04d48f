"""Image data sets by name: handwritten digits inside the package, Fashion-MNIST and CIFAR-10 in a folder.

The folder is named by the environment variable `TRIMTAB_DATA`. Every file is checked against its sha256
before it is read, so a damaged copy is an error and never a slightly different experiment.
"""

import difflib
import gzip
import hashlib
import io
import itertools
import lzma
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import DataError

FOLDER_VARIABLE = "TRIMTAB_DATA"

_DIGITS_SHA256 = "56691635b5c95f315ed55907c4fe83309809b3b822ee0b8d68e84bba3ffd4ca3"
_SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    "cifar10_full_jpeg.npz.xz": "3f8b46708afe2447eefa414de7d566509480256a23bda4dc065c6353c1739d21",
}


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
        return (images.float() - self.mean) / self.std


def load_images(name: str) -> ImageData:
    """Load a data set by name.

    Args:
        name: "digits" (1,437 + 360 grey images of 8×8; ships with the package), "fashion-mnist"
            (60,000 + 10,000 grey images of 28×28) or "cifar10" (50,000 + 10,000 colour images of 32×32, from
            JPEG copies, so pixels differ slightly from the original set's). The last two are read from the
            folder `TRIMTAB_DATA` names.

    Returns:
        The whole set, in memory.

    Raises:
        DataError: the name is unknown, the folder or a file in it is missing or damaged, or there is no
            Pillow.
    """
    if name not in _READERS:
        near = difflib.get_close_matches(str(name).lower(), _READERS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(f"unknown image data set {name!r}.{hint} There are: {', '.join(_READERS)}")
    (train_images, train_labels), (test_images, test_labels) = _READERS[name]()
    mean, std = _moments(train_images)
    return ImageData(
        name=name,
        train_images=torch.from_numpy(train_images),
        train_labels=torch.from_numpy(train_labels.astype(np.int64)),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels.astype(np.int64)),
        num_classes=int(train_labels.max()) + 1,
        mean=mean,
        std=std,
    )


Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
_Part = tuple[Bytes, Bytes]  # images (N, C, height, width), labels (N,)


def _digits() -> tuple[_Part, _Part]:
    content = _checked(Path(__file__).with_name("digits.npz"), _DIGITS_SHA256, "install trimtab again")
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        images, labels = archive["images"][:, None], archive["labels"]  # (1797, 1, 8, 8), (1797,)
    # RandomState's stream is frozen for good, so the split is the same with every version of NumPy
    order = np.random.RandomState(0).permutation(len(labels))
    test, train = order[:360], order[360:]
    return (images[train], labels[train]), (images[test], labels[test])


def _fashion_mnist() -> tuple[_Part, _Part]:
    def part(prefix: str) -> _Part:
        images = gzip.decompress(_external("fashion-mnist", f"{prefix}-images-idx3-ubyte.gz"))
        labels = gzip.decompress(_external("fashion-mnist", f"{prefix}-labels-idx1-ubyte.gz"))
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
    content = lzma.decompress(_external("cifar10", "cifar10_full_jpeg.npz.xz"))
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


def _external(data: str, name: str) -> bytes:
    """The checked content of a data set's file in the data folder."""
    relative = f"{data}/{name}"
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise DataError(f"{relative} is needed: set {FOLDER_VARIABLE} to the folder that holds it")
    if not Path(folder).is_dir():
        raise DataError(f"{FOLDER_VARIABLE} names {folder}, which is not a folder; it must hold {relative}")
    return _checked(Path(folder) / relative, _SHA256[name], "copy it again from its source")


def _checked(path: Path, sha256: str, remedy: str) -> bytes:
    """The content of `path` if its checksum is the expected one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(
            f"{path} is damaged: expected sha256 {sha256[:12]}…, got {found[:12]}… in {len(content):,} bytes; {remedy}"
        )
    return content


def _moments(images: Bytes) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C, 1, 1); exact, because bytes can be counted."""
    values = np.arange(256)
    moments = []
    for channel in images.swapaxes(0, 1):  # (N, height, width)
        # in parts, because bincount works on an eight times larger copy
        counts = sum(np.bincount(part.ravel(), minlength=256) for part in np.array_split(channel, 64))
        mean = np.average(values, weights=counts)
        moments.append((mean, np.sqrt(np.average((values - mean) ** 2, weights=counts))))
    mean_std = torch.tensor(np.array(moments), dtype=torch.float32)  # (C, 2)
    return mean_std[:, 0, None, None], mean_std[:, 1, None, None]
