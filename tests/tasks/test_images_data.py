import builtins
import dataclasses
import gzip
import hashlib
import io
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.errors import DataError
from trimtab.tasks.data import DATA_SETS, DataFile
from trimtab.tasks.images import Split, load_images
from trimtab.tasks.images.sets import packed as packed_sets

real = pytest.mark.skipif(not os.environ.get("TRIMTAB_DATA"), reason="TRIMTAB_DATA is not set")


@pytest.fixture(autouse=True)
def _cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def images_of(split: Split) -> Tensor:
    """All images of a set that is held in memory, (N, C, side, side)."""
    assert split.images is not None
    return split.images


def test_digits_are_all_there_and_split_once_and_for_all() -> None:
    data = load_images("digits")
    assert images_of(data.train).shape == (1437, 1, 8, 8)
    assert images_of(data.test).shape == (360, 1, 8, 8)
    assert (data.train.size, data.test.size, data.channels, data.side) == (1437, 360, 1, 8)
    assert images_of(data.train).dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.num_classes == 10
    assert data.classes == tuple("0123456789")
    together = torch.cat([data.train.labels, data.test.labels]).bincount()
    assert together.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as the source counts them
    # the split never moves: these are the first test labels it has always had
    assert data.test.labels[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]
    assert torch.equal(images_of(load_images("digits").test), images_of(data.test))


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_images_in_memory_are_read_by_index_with_and_without_a_generator(generator: torch.Generator | None) -> None:
    data = load_images("digits")
    order = torch.tensor([5, 5, 0])
    assert torch.equal(data.train.read(order, generator), images_of(data.train)[order])
    assert torch.equal(data.test.read(order, generator), images_of(data.test)[order])


def test_training_pixels_become_standard_and_test_pixels_follow_them() -> None:
    data = load_images("digits")
    train, test = images_of(data.train), images_of(data.test)
    pixels = data.standardize(train)
    assert pixels.dtype == torch.float32
    assert pixels.mean().item() == pytest.approx(0, abs=1e-5)
    assert pixels.std().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(pixels, (train.float() - data.mean) / data.std)
    first = (test[0, 0, 2, 3].item() - data.mean.item()) / data.std.item()
    assert data.standardize(test[:1])[0, 0, 2, 3].item() == pytest.approx(first, rel=1e-5)


def test_each_channel_has_moments_of_its_own() -> None:
    images = np.random.RandomState(0).randint(0, 256, (200, 3, 4, 4)).astype(np.uint8)
    images[:, 1] //= 4
    mean, std = packed_sets.moments(images)
    assert mean.shape == std.shape == (3, 1, 1)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean.flatten(), images.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std.flatten(), images.std((0, 2, 3)), rtol=1e-6)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match=r"unknown image data set 'fashon_mnist'. Did you mean fashion-mnist\?"):
        load_images("fashon_mnist")
    with pytest.raises(
        DataError,
        match=r"There are: digits, fashion-mnist, cifar10, .*fake-imagenet, and the path of a folder with train/",
    ):
        load_images("zzz")


def test_a_missing_file_tells_where_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    with pytest.raises(
        DataError,
        match=r"fashion-mnist/.* is missing: `trimtab data get fashion-mnist` fetches it, or set TRIMTAB_DATA to",
    ):
        load_images("fashion-mnist")
    with pytest.raises(DataError, match=r"cifar10/.* is missing: set TRIMTAB_DATA to the folder that holds it"):
        load_images("cifar10-jpeg")
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"cifar10/.* is missing: copy it to {tmp_path}"):
        load_images("cifar10-jpeg")
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"TRIMTAB_DATA names .*nowhere, which is not a folder"):
        load_images("fashion-mnist")


def write_fashion(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Fashion-MNIST of 20 + 10 random images in the real format, with checksums that fit it."""
    random = np.random.RandomState(0)
    place = folder / "fashion-mnist"
    place.mkdir()
    files = []
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = random.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        images_bytes = struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes()
        labels_bytes = struct.pack(">II", 2049, count) + labels.tobytes()
        for kind, content in (("images-idx3", images_bytes), ("labels-idx1", labels_bytes)):
            name = f"{prefix}-{kind}-ubyte.gz"
            packed = gzip.compress(content)
            (place / name).write_bytes(packed)
            files.append(DataFile(f"fashion-mnist/{name}", len(packed), hashlib.sha256(packed).hexdigest()))
    data = dataclasses.replace(DATA_SETS["fashion-mnist"], files=tuple(files))
    monkeypatch.setitem(DATA_SETS, "fashion-mnist", data)
    monkeypatch.setenv("TRIMTAB_DATA", str(folder))
    return place


def test_the_idx_format_is_read_pixel_for_pixel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_fashion(tmp_path, monkeypatch)
    data = load_images("fashion-mnist")
    expected = np.random.RandomState(0).randint(0, 256, (20, 28, 28)).astype(np.uint8)
    assert np.array_equal(images_of(data.train)[:, 0].numpy(), expected)
    assert data.train.labels.tolist() == [*range(10), *range(10)]
    assert images_of(data.test).shape == (10, 1, 28, 28)
    assert data.classes[9] == "Ankle boot"

    (tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz").unlink()
    again = load_images("fashion-mnist")  # prepared, so that no file is read again
    assert torch.equal(images_of(again.train), images_of(data.train))
    assert again.classes == data.classes
    assert torch.equal(again.mean, data.mean)


def test_what_is_prepared_belongs_to_the_checksums_of_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_fashion(tmp_path, monkeypatch)
    load_images("fashion-mnist")
    first = DATA_SETS["fashion-mnist"].files[0]
    other = dataclasses.replace(first, sha256="0" * 64)
    changed = dataclasses.replace(DATA_SETS["fashion-mnist"], files=(other, *DATA_SETS["fashion-mnist"].files[1:]))
    monkeypatch.setitem(DATA_SETS, "fashion-mnist", changed)
    with pytest.raises(DataError, match=r"is damaged: expected .* of sha256 000000000000"):
        load_images("fashion-mnist")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (0, [], "digits has 0 training images and 0 labels"),
        (3, [0, 1], "digits has 3 training images and 2 labels"),
        (3, [0, 1, 2], "digits has 2 classes and a training label 2"),
    ],
)
def test_an_empty_set_and_labels_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, images: int, labels: list[int], message: str
) -> None:
    part = (np.zeros((images, 1, 8, 8), np.uint8), np.array(labels, np.uint8))
    monkeypatch.setitem(packed_sets.PACKED, "digits", lambda: packed_sets.Packed(("a", "b"), part, part))
    with pytest.raises(DataError, match=message):
        load_images("digits")


def test_damaged_digits_say_that_trimtab_is_to_be_installed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_sets, "_DIGITS_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"digits.npz is damaged: install trimtab again"):
        load_images("digits")


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_a_damaged_truncated_or_missing_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    file = write_fashion(tmp_path, monkeypatch) / name
    content = file.read_bytes()

    file.write_bytes(content[:-5])
    with pytest.raises(DataError, match=f"{name} is damaged.*copy or get it again") as truncated:
        load_images("fashion-mnist")
    assert "\n" not in str(truncated.value)

    file.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(DataError, match=f"{name} is damaged: expected .* of sha256"):
        load_images("fashion-mnist")

    file.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        load_images("fashion-mnist")

    file.mkdir()
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        load_images("fashion-mnist")


def write_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes]) -> None:
    """An archive with these files in it, in the place of a CIFAR set's, with the checksum that fits it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    real = DATA_SETS[name]
    path = folder / real.files[0].path
    path.parent.mkdir()
    path.write_bytes(buffer.getvalue())
    file = dataclasses.replace(
        real.files[0], size=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    monkeypatch.setitem(DATA_SETS, name, dataclasses.replace(real, files=(file,)))
    monkeypatch.setenv("TRIMTAB_DATA", str(folder))


def cifar10_files(images: np.ndarray, labels: list[int]) -> dict[str, bytes]:
    """Images (6 × N, 3, 32, 32) in the six files of CIFAR-10's binary version: a byte of label, then the pixels."""
    records = [bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)]
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    each = len(records) // 6
    return {
        f"cifar-10-batches-bin/{name}.bin": b"".join(records[i * each : (i + 1) * each]) for i, name in enumerate(names)
    }


def test_cifar10_is_read_from_its_owners_binary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = np.random.RandomState(0).randint(0, 256, (12, 3, 32, 32)).astype(np.uint8)
    labels = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    write_cifar(tmp_path, monkeypatch, "cifar10", cifar10_files(images, labels))
    data = load_images("cifar10")
    assert np.array_equal(images_of(data.train), images[:10])
    assert np.array_equal(images_of(data.test), images[10:])
    assert data.train.labels.tolist() + data.test.labels.tolist() == labels
    assert [data.classes[label] for label in data.test.labels] == ["dog", "ship"]
    assert (data.channels, data.side) == (3, 32)
    np.testing.assert_allclose(data.mean.flatten(), images[:10].mean((0, 2, 3)), rtol=1e-6)


def test_cifar100_has_its_fine_labels_and_their_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = np.random.RandomState(0).randint(0, 256, (5, 3, 32, 32)).astype(np.uint8)
    fine, coarse = [99, 0, 50, 7, 19], [1, 2, 3, 4, 5]
    records = [bytes([c, f]) + image.tobytes() for c, f, image in zip(coarse, fine, images, strict=True)]
    names = [f"thing_{number}" for number in range(100)]
    files = {
        "cifar-100-binary/fine_label_names.txt": "\n".join(names).encode() + b"\n",
        "cifar-100-binary/train.bin": b"".join(records[:3]),
        "cifar-100-binary/test.bin": b"".join(records[3:]),
    }
    write_cifar(tmp_path, monkeypatch, "cifar100", files)
    data = load_images("cifar100")
    assert np.array_equal(images_of(data.train), images[:3])
    assert np.array_equal(images_of(data.test), images[3:])
    assert data.train.labels.tolist() + data.test.labels.tolist() == fine
    assert data.classes == tuple(names)


def test_a_cifar_archive_of_another_structure_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = np.zeros((6, 3, 32, 32), np.uint8)
    whole = cifar10_files(images, [0] * 6)
    cut = whole | {"cifar-10-batches-bin/test_batch.bin": bytes(3072)}
    for number, (files, message) in enumerate(
        [
            ({name: whole[name] for name in list(whole)[:4]}, "the archive has no cifar-10-batches-bin/data_batch_5"),
            (cut, r"test_batch.bin should hold records of 3,073 bytes each, and has 3,072 bytes"),
            (cifar10_files(images, [0, 0, 0, 10, 0, 0]), "cifar10 has 10 classes and a training label 10"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_cifar(folder, monkeypatch, "cifar10", files)
        with pytest.raises(DataError, match=message):
            load_images("cifar10")


def test_a_missing_cifar10_names_what_is_there_in_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar10_full_jpeg.npz.xz").touch()
    with pytest.raises(DataError, match=r"JPEG copies of CIFAR-10 are here, .* as the data set cifar10-jpeg"):
        load_images("cifar10")
    (tmp_path / "cifar10" / "cifar-10-python.tar.gz").touch()
    with pytest.raises(
        DataError, match=r"Python version of cifar10, which is pickled code: only .*cifar-10-binary.tar.gz; `trimtab"
    ):
        load_images("cifar10")


def test_jpeg_copies_without_pillow_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_pillow(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "PIL":
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    for name in ("cifar10-jpeg", "imagenet"):
        with pytest.raises(DataError, match=rf"{name} needs Pillow: pip install 'trimtab\[lab\]'"):
            load_images(name)


def test_fake_images_are_as_many_as_imagenet_has_and_always_the_same() -> None:
    data = load_images("fake-imagenet")
    assert (data.train.size, data.test.size, data.num_classes, data.side) == (1_281_167, 50_000, 1000, 224)
    few = load_images("fake-imagenet:8", image_size=10)
    assert (few.train.size, few.test.size, few.num_classes) == (8, 8, 1000)
    images = few.train.read(torch.tensor([7, 0, 7]), torch.Generator())
    assert images.shape == (3, 3, 10, 10)
    assert images.dtype == torch.uint8
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images[:1], load_images("fake-imagenet:8", 10).train.read(torch.tensor([7]), None))
    assert not torch.equal(images[1:2], few.test.read(torch.tensor([0]), None))
    assert few.train.labels.tolist() == [*range(8)]
    pixels = data.standardize(data.train.read(torch.arange(2), None))
    # of 300,000 uniform bytes the mean is within 0.002 and the deviation within 0.001 of theirs, one deviation each
    assert pixels.mean().item() == pytest.approx(0, abs=0.01)
    assert pixels.std().item() == pytest.approx(1, abs=0.01)
    for wrong in ("fake-imagenet:", "fake-imagenet:0", "fake-imagenet:many"):
        with pytest.raises(DataError, match="expected fake-imagenet:N with the number N of images in each split"):
            load_images(wrong)


@real
@pytest.mark.data
def test_the_real_fashion_mnist() -> None:
    data = load_images("fashion-mnist")
    assert images_of(data.train).shape == (60000, 1, 28, 28)
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert data.mean.item() / 255 == pytest.approx(0.2860, abs=5e-5)  # the figures everyone uses
    assert data.std.item() / 255 == pytest.approx(0.3530, abs=5e-5)


@real
@pytest.mark.data
def test_the_real_cifar10_copies() -> None:
    data = load_images("cifar10-jpeg")
    assert images_of(data.train).shape == (50000, 3, 32, 32)
    assert data.test.labels.bincount().tolist() == [1000] * 10
    # 0.4914, 0.4822, 0.4465 are the original's; the JPEG copies are a little off
    np.testing.assert_allclose(data.mean.flatten() / 255, [0.4914, 0.4822, 0.4465], atol=5e-4)
