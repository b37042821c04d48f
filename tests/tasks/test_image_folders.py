import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trimtab.errors import DataError
from trimtab.tasks.data.command import data_command
from trimtab.tasks.images import ImageData, load_images
from trimtab.tasks.images.sets import folder as folder_data
from trimtab.tasks.images.sets import unreadable as unreadable_files
from trimtab.tasks.images.sets.decoding import evaluation_view

CLASSES = ("Zebra", "bär", "n01440764")  # in the order of their labels: upper case comes first


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    return tmp_path / "cache" / "trimtab"


def picture(path: Path, seed: int) -> None:
    random = np.random.RandomState(seed)
    size = random.randint(20, 60, 2)
    Image.fromarray(random.randint(0, 256, (*size, 3)).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 4, 2 and 3 training images, and of one test image each."""
    root = tmp_path / "bilder für ä"
    for split, counts in (("train", (4, 2, 3)), ("val", (1, 1, 1))):
        for name, count in zip(CLASSES, counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                suffix = ("png", "JPEG", "jpg", "webp")[i]
                picture(root / split / name / f"{i}.{suffix}", len(name) * 10 + i)
    return root


def load(folder: Path, skip_unreadable: bool = False) -> ImageData:
    return load_images(str(folder), 16, skip_unreadable)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_folder_has_its_classes_in_order_and_every_image_once(folder: Path) -> None:
    data = load(folder)
    assert data.classes == CLASSES
    assert (data.train.size, data.test.size, data.channels, data.side) == (9, 3, 3, 16)
    assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert data.train.labels.dtype == torch.int64
    assert data.test.labels.tolist() == [0, 1, 2]
    assert data.train.images is None
    assert data.unreadable == ()
    paths = [path for name in CLASSES for path in sorted((folder / "train" / name).iterdir())]
    images = data.train.read(torch.tensor([8, 0, 4, 0]), None)
    assert images.dtype == torch.uint8
    for image, index in zip(images, [8, 0, 4, 0], strict=True):
        assert np.array_equal(image, evaluation_view(paths[index], 16))


def test_the_same_generator_gives_the_same_batch_whatever_the_number_of_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, batches = load(folder), []
    order = torch.arange(9).repeat(3)
    for count in (1, 7):
        with ThreadPoolExecutor(count) as pool, monkeypatch.context() as patch:
            patch.setattr(folder_data, "threads", lambda pool=pool: pool)
            batches.append(data.train.read(order, generator()))
    assert torch.equal(*batches)
    assert not torch.equal(batches[0][:9], batches[0][9:18])  # the same images, cropped elsewhere
    one = generator()
    first, second = data.train.read(order, one), data.train.read(order, one)
    assert torch.equal(first, batches[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, data.train.read(order, generator(1)))


def test_every_file_is_decoded_once_and_again_when_one_has_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []
    real = unreadable_files.what_is_wrong
    monkeypatch.setattr(unreadable_files, "what_is_wrong", lambda path: (looked.append(path), real(path))[1])
    load(folder)
    assert sorted(looked) == sorted(path for path in folder.rglob("*.*") if path.is_file())
    looked.clear()
    assert load(folder).train.size == 9
    assert looked == []
    picture(folder / "train" / "Zebra" / "new.png", 5)
    assert load(folder).train.size == 10
    assert len(looked) == 13


def break_some(folder: Path) -> None:
    """Five files of training that cannot be read, each in another way, and one of the test."""
    train = folder / "train" / "Zebra"
    for i in range(2):
        picture(train / f"cut{i}.png", i)
        (train / f"cut{i}.png").write_bytes((train / f"cut{i}.png").read_bytes()[:900])
    (train / "empty.jpg").touch()
    (train / "link.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "train" / "bär" / "text.jpeg").write_text("no image")
    (folder / "val" / "bär" / "text.jpeg").write_text("no image")


def test_unreadable_files_are_refused_counted_and_named(folder: Path, cache: Path) -> None:
    break_some(folder)
    for _ in range(2):  # also when it is known from the cache
        with pytest.raises(DataError) as caught:
            load(folder)
        message = str(caught.value)
        assert "has 6 files that cannot be read: train/Zebra/cut0.png (" in message
        assert "train/Zebra/empty.jpg (not an image); and 3 more. All of them: " in message
        assert message.endswith("leave them out with --skip-unreadable")
        listed = Path(message.partition("All of them: ")[2].partition(". Replace")[0])
        lines = listed.read_text(encoding="utf-8").splitlines()
        assert listed.is_relative_to(cache)
        assert len(lines) == 6
        assert lines[3] == f"{folder}/train/Zebra/link.jpg: No such file or directory"


def test_unreadable_files_are_left_out_when_asked_for_and_still_counted_and_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load(folder)
    break_some(folder)
    with caplog.at_level(logging.WARNING, "trimtab"):
        data = load(folder, skip_unreadable=True)
    assert "left out 6 files that cannot be read: train/Zebra/cut0.png (" in caplog.text
    assert data.train.labels.tolist() == whole.train.labels.tolist()
    assert data.test.labels.tolist() == whole.test.labels.tolist()
    assert torch.equal(data.train.read(torch.arange(9), None), whole.train.read(torch.arange(9), None))
    assert data.unreadable == (
        *(f"train/Zebra/{name}" for name in ("cut0.png", "cut1.png", "empty.jpg", "link.jpg")),
        *("train/bär/text.jpeg", "val/bär/text.jpeg"),
    )


def test_a_file_that_can_be_read_again_is_back_at_once(folder: Path) -> None:
    path = folder / "train" / "Zebra" / "0.png"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=r"1 file that cannot be read: train/Zebra/0.png"):
        load(folder)
    path.write_bytes(content)  # as after a change of its rights, which neither its size nor its time tells
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load(folder).train.size == 9


def test_a_class_none_of_whose_images_can_be_read_is_refused(folder: Path) -> None:
    for path in (folder / "train" / "bär").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the images of class bär in .*train can be read"):
        load(folder, skip_unreadable=True)


def test_a_file_that_breaks_later_is_named_when_it_is_read(folder: Path) -> None:
    data = load(folder)
    (folder / "train" / "n01440764" / "2.jpg").write_bytes(b"")
    data.train.read(torch.tensor([0, 7]), generator())
    for each in (generator(), None):
        with pytest.raises(DataError, match=r"n01440764/2.jpg cannot be read any more \(not an image\)"):
            data.train.read(torch.tensor([0, 8]), each)


def remove(path: Path) -> None:
    for each in sorted(path.rglob("*"), reverse=True):
        each.rmdir() if each.is_dir() else each.unlink()
    path.rmdir()


def flatten(folder: Path) -> None:
    """Make val/ as ImageNet's owners publish it: without folders."""
    remove(folder / "val")
    (folder / "val").mkdir()
    picture(folder / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
    picture(folder / "val" / "ILSVRC2012_val_00000002.JPEG", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: remove(folder), r"cannot be listed \(No such file or directory\): expected a folder of images"),
        (lambda folder: remove(folder / "val"), r"should hold train/ and val/, .* in both; it holds train$"),
        (flatten, r"val should hold a folder of images for each class, and has no folders in it; sort its 2 images"),
        (lambda folder: (folder / "train" / "empty").mkdir(), r"classes without an image in .*train: 1 \(empty\)"),
        (
            lambda folder: (folder / "val" / "bär").rename(folder / "val" / "Bär"),
            r"must hold the same classes; 1 only in train/: bär; 1 only in val/: Bär",
        ),
        (lambda folder: (folder / "train" / "bär" / "more").mkdir(), r"bär/more is a folder in that of a class"),
    ],
    ids=["no folder", "no val", "no class folders", "empty class", "other classes", "folder in a class"],
)
def test_a_folder_that_is_not_made_like_that_is_refused(
    folder: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_strays_are_named_and_hidden_files_passed_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train" / "README.txt").touch()
    (folder / "train" / "bär" / "boxes.xml").touch()
    (folder / "train" / ".DS_Store").touch()
    (folder / "val" / "bär" / "._0.png").touch()
    (folder / "val" / ".hidden").mkdir()
    with caplog.at_level(logging.WARNING, "trimtab"):
        data = load(folder)
    assert (data.train.size, data.test.size) == (9, 3)
    assert "passed over 2 files that are no image by the suffix: train/README.txt, train/bär/boxes.xml" in caplog.text


def test_links_one_class_and_names_that_are_no_text(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture(elsewhere / "a.png", 0)
    try:
        picture(elsewhere / os.fsdecode(b"\xff\xfe.png"), 1)
    except OSError:
        pytest.skip("this file system takes text only")
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
        (tmp_path / "set" / split / "thing").symlink_to(elsewhere)
    data = load(tmp_path / "set")
    assert (data.classes, data.train.size, data.num_classes) == (("thing",), 2, 1)
    assert torch.equal(data.train.read(torch.arange(2), None), data.test.read(torch.arange(2), None))
    (elsewhere / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"")
    with pytest.raises(DataError, match=r"thing/�+.png \(not an image\)"):
        load(tmp_path / "set")


def test_mean_and_deviation_are_those_of_the_training_images_and_imagenets_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(folder)
    pixels = data.train.read(torch.arange(9), None).double()  # a set so small is its own sample
    np.testing.assert_allclose(data.mean.flatten(), pixels.mean((0, 2, 3)), rtol=1e-6)
    deviation = pixels.transpose(0, 1).flatten(1).std(1, correction=0)
    np.testing.assert_allclose(data.std.flatten(), deviation, rtol=1e-6)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenet").symlink_to(folder)
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path / "data"))
    found = load_images("imagenet")
    assert (found.name, found.side, found.train.size) == ("imagenet", 224, 9)
    assert (found.mean / 255).flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert (found.std / 255).flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_a_missing_imagenet_and_a_side_of_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"imagenet is missing: ImageNet is given out by image-net.org only"):
        load_images("imagenet")
    with pytest.raises(DataError, match="a side of at least 1 pixel, got 0"):
        load_images("imagenet", 0)


def test_the_check_command_names_every_file_of_a_folder_that_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_command(["check", str(folder)]) == 0
    assert f"{folder}/train: 9 images in 3 classes: good" in capsys.readouterr().out
    break_some(folder)
    (folder / "val" / "notes.txt").touch()
    assert data_command(["check", str(folder)]) == 1
    shown = capsys.readouterr()
    assert f"{folder}/train/Zebra/empty.jpg: not an image" in shown.out
    assert f"{folder}/train: 14 images in 3 classes: 5 cannot be read\n" in shown.out
    assert f"{folder}/val: 4 images in 3 classes: 1 cannot be read; 1 other files passed over" in shown.out
    assert "6 files are damaged or missing" in shown.err
