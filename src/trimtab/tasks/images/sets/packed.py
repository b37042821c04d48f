"""Image sets that fit into memory, from their owners' own files: digits, Fashion-MNIST, CIFAR-10 and CIFAR-100."""

import gzip
import hashlib
import io
import itertools
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from trimtab.errors import DataError
from trimtab.tasks.data.folder import data_folder, find_file, read_data
from trimtab.tasks.data.prepare import Arrays, prepared
from trimtab.tasks.data.table import DATA_SETS
from trimtab.tasks.images.sets.image_data import ImageData, Split

_DIGITS_SHA256 = "56691635b5c95f315ed55907c4fe83309809b3b822ee0b8d68e84bba3ffd4ca3"
_FORMAT = "images 2"  # changes with what is made of the files here

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
_Part = tuple[Bytes, Bytes]  # images (N, C, side, side), labels (N,)


class Packed(NamedTuple):
    """What a set's files hold.

    Attributes:
        classes: their names.
        train: images (N, C, side, side) and labels (N,), uint8.
        test: likewise.
    """

    classes: tuple[str, ...]
    train: _Part
    test: _Part


def load_packed(name: str) -> ImageData:
    """Load one of the sets in `PACKED`; one from the data folder is prepared once and then memory-mapped.

    Raises:
        DataError: a file is missing or damaged, or there is no Pillow where it is needed.
    """

    def make() -> Arrays:
        return _arrays(name, PACKED[name]())

    if name in DATA_SETS:
        arrays = prepared(name, [_FORMAT, *(file.sha256 for file in DATA_SETS[name].files)], make)
    else:
        arrays = make()
    classes = tuple(map(str, arrays.pop("classes")))
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}

    def split(part: str) -> Split:
        images, labels = tensors[f"{part}_images"], tensors[f"{part}_labels"]
        return Split(len(labels), labels, lambda indices, _: images.index_select(0, indices), images)

    _, channels, _, side = tensors["train_images"].shape
    return ImageData(
        name, classes, channels, side, tensors["mean"], tensors["std"], train=split("train"), test=split("test")
    )


def _arrays(name: str, packed: Packed) -> Arrays:
    """Everything of an `ImageData` that is an array, and the names of the classes as one."""
    for part, (images, labels) in (("training", packed.train), ("test", packed.test)):
        if not 0 < len(images) == len(labels):
            raise DataError(f"{name} has {len(images):,} {part} images and {len(labels):,} labels for them")
        if labels.max() >= len(packed.classes):
            raise DataError(f"{name} has {len(packed.classes)} classes and a {part} label {labels.max()}")
    mean, std = moments(packed.train[0])
    return {
        "classes": np.array(packed.classes),
        "train_images": packed.train[0],
        "train_labels": packed.train[1].astype(np.int64),
        "test_images": packed.test[0],
        "test_labels": packed.test[1].astype(np.int64),
        "mean": mean,
        "std": std,
    }


def _digits() -> Packed:
    path = Path(__file__).with_name("digits.npz")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != _DIGITS_SHA256:
        raise DataError(f"{path} is damaged: install trimtab again")
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        images, labels = archive["images"][:, None], archive["labels"]  # (1797, 1, 8, 8), (1797,)
    # RandomState's stream is frozen for good, so the split is the same with every version of NumPy
    order = np.random.RandomState(0).permutation(len(labels))
    test, train = order[:360], order[360:]
    return Packed(tuple("0123456789"), (images[train], labels[train]), (images[test], labels[test]))


def _fashion_mnist() -> Packed:
    def part(prefix: str) -> _Part:
        images = gzip.decompress(read_data(DATA_SETS["fashion-mnist"], f"{prefix}-images-idx3-ubyte.gz"))
        labels = gzip.decompress(read_data(DATA_SETS["fashion-mnist"], f"{prefix}-labels-idx1-ubyte.gz"))
        # the IDX headers are 16 and 8 bytes; copied because a view of bytes is read-only
        return (
            np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy(),
            np.frombuffer(labels, np.uint8, offset=8).copy(),
        )

    return Packed(_FASHION, part("train"), part("t10k"))


def _cifar10() -> Packed:
    with _cifar_archive("cifar10", "cifar-10") as archive:
        batches = [
            _cifar_records(archive, f"cifar-10-batches-bin/{name}.bin", label_bytes=1)
            for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
        ]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches[:5], strict=True))
    return Packed(_CIFAR10, (images, labels), batches[5])


def _cifar100() -> Packed:
    with _cifar_archive("cifar100", "cifar-100") as archive:
        names = _member(archive, "cifar-100-binary/fine_label_names.txt").decode("ascii").split()
        # a coarse label, of 20 classes, comes before the fine one
        train = _cifar_records(archive, "cifar-100-binary/train.bin", label_bytes=2)
        test = _cifar_records(archive, "cifar-100-binary/test.bin", label_bytes=2)
    return Packed(tuple(names), train, test)


def _cifar_archive(name: str, stem: str) -> tarfile.TarFile:
    """The owners' binary archive, checked; where it is missing, the error names what is there in its place."""
    data = DATA_SETS[name]
    if not find_file(data.files[0]).exists():
        folder = data_folder() / name
        python = [folder / f"{stem}-python.tar.gz", folder / f"{stem}-batches-py", folder / f"{stem}-python"]
        if any(path.exists() for path in python):
            raise DataError(
                f"{folder} holds the Python version of {name}, which is pickled code: only the binary version is "
                f"read, {data.files[0].path}; `trimtab data get {name}` fetches it"
            )
        if name == "cifar10" and find_file(DATA_SETS["cifar10-jpeg"].files[0]).exists():
            raise DataError(
                f"{data.files[0].path} is missing: `trimtab data get cifar10` fetches it. JPEG copies of CIFAR-10 are "
                "here, whose accuracies differ slightly, as the data set cifar10-jpeg"
            )
    return tarfile.open(fileobj=io.BytesIO(read_data(data, f"{stem}-binary.tar.gz")), mode="r:gz")


def _cifar_records(archive: tarfile.TarFile, path: str, label_bytes: int) -> _Part:
    """Images and labels of one file: records of the label and 3 × 1,024 bytes, of which the last label counts."""
    content = np.frombuffer(_member(archive, path), np.uint8)
    length = label_bytes + 3 * 32 * 32
    if not len(content) or len(content) % length:
        raise DataError(f"{path} should hold records of {length:,} bytes each, and has {len(content):,} bytes")
    records = content.reshape(-1, length)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32).copy(), records[:, label_bytes - 1].copy()


def _member(archive: tarfile.TarFile, path: str) -> bytes:
    try:
        file = archive.extractfile(path)
    except KeyError:
        file = None
    if file is None:
        raise DataError(f"the archive has no {path} in it")
    return file.read()


def _cifar10_jpeg() -> Packed:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("cifar10-jpeg needs Pillow: pip install 'trimtab[lab]'") from None
    content = lzma.decompress(read_data(DATA_SETS["cifar10-jpeg"], "cifar10_full_jpeg.npz.xz"))
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:

        def part(prefix: str) -> _Part:
            joined, offsets = archive[f"{prefix}_jpeg"], archive[f"{prefix}_offsets"]
            images = np.empty((len(offsets) - 1, 3, 32, 32), np.uint8)
            for index, (start, end) in enumerate(itertools.pairwise(offsets)):
                picture = Image.open(io.BytesIO(joined[start:end].tobytes()))
                images[index] = np.asarray(picture).transpose(2, 0, 1)  # (32, 32, 3) -> (3, 32, 32)
            return images, archive[f"{prefix}_y"]

        return Packed(_CIFAR10, part("train"), part("test"))


PACKED: dict[str, Callable[[], Packed]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar10-jpeg": _cifar10_jpeg,
    "cifar100": _cifar100,
}
"""Reads each set that is held in memory, by name."""


def moments(images: Bytes) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each channel, (C, 1, 1); exact, because bytes can be counted."""
    values = np.arange(256)
    found = []
    for channel in images.swapaxes(0, 1):  # (N, height, width)
        # in parts, because bincount works on an eight times larger copy
        counts = sum(np.bincount(part.ravel(), minlength=256) for part in np.array_split(channel, 64))
        mean = np.average(values, weights=counts)
        found.append((mean, np.sqrt(np.average((values - mean) ** 2, weights=counts))))
    mean, std = np.array(found, dtype=np.float32).T[..., None, None]  # (2, C, 1, 1)
    return mean.copy(), std.copy()
