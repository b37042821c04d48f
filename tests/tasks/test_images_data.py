import builtins
import dataclasses
import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.errors import DataError
from trimtab.tasks.data import DATA_SETS, DataFile
from trimtab.tasks.images import data as images_data
from trimtab.tasks.images import load_images

real = pytest.mark.skipif(not os.environ.get("TRIMTAB_DATA"), reason="TRIMTAB_DATA is not set")


@pytest.fixture(autouse=True)
def _cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_digits_are_all_there_and_split_once_and_for_all() -> None:
    data = load_images("digits")
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert data.num_classes == 10
    together = torch.cat([data.train_labels, data.test_labels]).bincount()
    assert together.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as the source counts them
    # the split never moves: these are the first test labels it has always had
    assert data.test_labels[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]
    assert torch.equal(load_images("digits").test_images, data.test_images)


def test_training_pixels_become_standard_and_test_pixels_follow_them() -> None:
    data = load_images("digits")
    pixels = data.standardize(data.train_images)
    assert pixels.dtype == torch.float32
    assert pixels.mean().item() == pytest.approx(0, abs=1e-5)
    assert pixels.std().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(pixels, (data.train_images.float() - data.mean) / data.std)
    first = (data.test_images[0, 0, 2, 3].item() - data.mean.item()) / data.std.item()
    assert data.standardize(data.test_images[:1])[0, 0, 2, 3].item() == pytest.approx(first, rel=1e-5)


def test_each_channel_has_moments_of_its_own() -> None:
    images = np.random.RandomState(0).randint(0, 256, (200, 3, 4, 4)).astype(np.uint8)
    images[:, 1] //= 4
    mean, std = images_data._moments(images)
    assert mean.shape == std.shape == (3, 1, 1)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean.flatten(), images.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std.flatten(), images.std((0, 2, 3)), rtol=1e-6)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match=r"unknown image data set 'fashon_mnist'. Did you mean fashion-mnist\?"):
        load_images("fashon_mnist")
    with pytest.raises(DataError, match="There are: digits, fashion-mnist, cifar10"):
        load_images("zzz")


def test_a_missing_file_tells_where_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    with pytest.raises(
        DataError,
        match=r"fashion-mnist/.* is missing: `trimtab data get fashion-mnist` fetches it, or set TRIMTAB_DATA to",
    ):
        load_images("fashion-mnist")
    with pytest.raises(DataError, match=r"cifar10/.* is missing: set TRIMTAB_DATA to the folder that holds it"):
        load_images("cifar10")
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"cifar10/.* is missing: copy it to {tmp_path}"):
        load_images("cifar10")
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
    assert np.array_equal(data.train_images[:, 0].numpy(), expected)
    assert data.train_labels.tolist() == [*range(10), *range(10)]
    assert data.test_images.shape == (10, 1, 28, 28)

    (tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz").unlink()
    again = load_images("fashion-mnist")  # prepared, so that no file is read again
    assert torch.equal(again.train_images, data.train_images)
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


@pytest.mark.parametrize(("images", "labels"), [(0, 0), (3, 2)])
def test_an_empty_set_and_labels_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, images: int, labels: int
) -> None:
    part = (np.zeros((images, 1, 8, 8), np.uint8), np.zeros(labels, np.uint8))
    monkeypatch.setitem(images_data._READERS, "digits", lambda: (part, part))
    with pytest.raises(DataError, match=f"digits has {images} training images and {labels} labels"):
        load_images("digits")


def test_damaged_digits_say_that_trimtab_is_to_be_installed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_data, "_DIGITS_SHA256", "0" * 64)
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


def test_cifar10_without_pillow_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_pillow(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "PIL":
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(DataError, match=r"needs Pillow: pip install 'trimtab\[lab\]'"):
        load_images("cifar10")


@real
@pytest.mark.data
def test_the_real_fashion_mnist() -> None:
    data = load_images("fashion-mnist")
    assert data.train_images.shape == (60000, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert data.mean.item() / 255 == pytest.approx(0.2860, abs=5e-5)  # the figures everyone uses
    assert data.std.item() / 255 == pytest.approx(0.3530, abs=5e-5)


@real
@pytest.mark.data
def test_the_real_cifar10() -> None:
    data = load_images("cifar10")
    assert data.train_images.shape == (50000, 3, 32, 32)
    assert data.test_labels.bincount().tolist() == [1000] * 10
    # 0.4914, 0.4822, 0.4465 are the original's; the JPEG copies are a little off
    np.testing.assert_allclose(data.mean.flatten() / 255, [0.4914, 0.4822, 0.4465], atol=5e-4)
