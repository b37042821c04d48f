import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trimtab.tasks.images.sets.decoding import NUM_DRAWS, evaluation_view, random_crop, training_view, what_is_wrong

RED, WHITE = (200, 30, 60), (255, 255, 255)
WHOLE = [0.9, 1.0, 0.5, 0.5, 0.5] + [0.0] * (NUM_DRAWS - 5)
"""Draws that crop the whole of a square, and do not flip it."""


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 / width, y * 255 / height, x * 0 + 99], -1).astype(np.uint8))


def palette(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (30, 30), 1)
    image.putpalette([0, 0, 0, *colour])
    return image


@pytest.mark.parametrize(
    ("image", "name", "options", "colour", "tolerance"),
    [
        (Image.new("RGB", (30, 30), RED), "a.png", {}, RED, 0),
        (Image.new("RGB", (30, 30), RED), "a.JPEG", {"quality": 95}, RED, 2),
        (Image.new("RGB", (30, 30), RED), "a.webp", {"lossless": True}, RED, 0),
        (Image.new("L", (30, 30), 77), "grey.png", {}, (77, 77, 77), 0),
        (Image.new("L", (30, 30), 77), "grey.jpg", {}, (77, 77, 77), 1),
        (Image.new("1", (30, 30), 1), "bits.png", {}, WHITE, 0),
        (Image.new("I;16", (30, 30), 0x4D21), "16-bit.png", {}, (0x4D,) * 3, 0),
        (Image.new("LA", (30, 30), (77, 255)), "grey-alpha.png", {}, (77, 77, 77), 0),
        (Image.new("RGBA", (30, 30), (*RED, 0)), "transparent.png", {}, WHITE, 0),
        (Image.new("RGBA", (30, 30), (*RED, 255)), "opaque.png", {}, RED, 0),
        (Image.new("RGB", (30, 30), RED), "colour-key.png", {"transparency": RED}, WHITE, 0),
        (palette(RED), "palette.png", {}, RED, 0),
        (palette(RED), "palette-alpha.png", {"transparency": bytes([255, 0])}, WHITE, 0),
        (Image.new("CMYK", (30, 30), (0, 255, 255, 0)), "cmyk.jpg", {"quality": 95}, (255, 0, 0), 2),
        (Image.new("CMYK", (30, 30), (0, 255, 255, 0)), "cmyk.tif", {}, (255, 0, 0), 0),
        (palette(RED), "moving.gif", {"save_all": True, "append_images": [palette(WHITE)]}, RED, 0),
        (
            Image.new("RGB", (30, 30), RED),
            "moving.png",
            {"save_all": True, "append_images": [Image.new("RGB", (30, 30))]},
            RED,
            0,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_image_becomes_rgb(
    tmp_path: Path,
    image: Image.Image,
    name: str,
    options: dict[str, object],
    colour: tuple[int, int, int],
    tolerance: int,
) -> None:
    image.save(tmp_path / name, **options)
    assert what_is_wrong(tmp_path / name) is None
    for view in (evaluation_view(tmp_path / name, 8), training_view(tmp_path / name, 8, WHOLE)):
        assert view.shape == (3, 8, 8)
        assert view.dtype == np.uint8
        # JPEG rounds colours in its own space
        assert np.abs(view.astype(int) - np.array(colour)[:, None, None]).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_camera_was_held(tmp_path: Path, orientation: int) -> None:
    upright = gradient(60, 40)
    # how the camera stored it: the inverse of what EXIF says is to be done to it
    turn = Image.Transpose
    stored = {
        1: upright,
        2: upright.transpose(turn.FLIP_LEFT_RIGHT),
        3: upright.transpose(turn.ROTATE_180),
        4: upright.transpose(turn.FLIP_TOP_BOTTOM),
        5: upright.transpose(turn.TRANSPOSE),
        6: upright.transpose(turn.ROTATE_90),
        7: upright.transpose(turn.TRANSVERSE),
        8: upright.transpose(turn.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    draws = torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(0)).tolist()
    for view in (lambda path: evaluation_view(path, 16), lambda path: training_view(path, 16, draws)):
        assert np.array_equal(view(tmp_path / "turned.png"), view(tmp_path / "upright.png"))


@pytest.mark.parametrize(("width", "height", "side"), [(60, 40, 16), (40, 61, 32), (224, 224, 224), (10, 17, 28)])
def test_the_evaluation_view_is_pillows_resize_and_a_centre_crop(
    tmp_path: Path, width: int, height: int, side: int
) -> None:
    image = noise(width, height)
    image.save(tmp_path / "noise.png")
    shorter = round(side * 256 / 224)
    size = (width * shorter // min(width, height), height * shorter // min(width, height))
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    whole = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    found = evaluation_view(tmp_path / "noise.png", side).transpose(1, 2, 0)
    assert np.abs(found.astype(int) - np.asarray(whole)).max() <= 1  # each rounds its weights on its own


def test_a_training_view_is_its_crop_resized_and_flipped(tmp_path: Path) -> None:
    image = noise(60, 60)
    image.save(tmp_path / "noise.png")
    whole = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(training_view(tmp_path / "noise.png", 24, WHOLE), whole)
    assert np.array_equal(training_view(tmp_path / "noise.png", 24, [0.1, *WHOLE[1:]]), whole[..., ::-1])
    # a quarter of the area, square, in the lower right corner
    corner = [0.9, (0.25 - 0.08) / 0.92, 0.5, 1 - 1e-9, 1 - 1e-9, *WHOLE[5:]]
    expected = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC, (30, 30, 60, 60))).transpose(2, 0, 1)
    assert np.array_equal(training_view(tmp_path / "noise.png", 24, corner), expected)


def test_a_large_jpeg_that_is_decoded_smaller_shows_the_same(tmp_path: Path) -> None:
    image = gradient(640, 480)
    image.save(tmp_path / "large.jpg", quality=95)
    image.save(tmp_path / "large.png")
    for seed in range(5):
        draws = torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(seed)).tolist()
        small, exact = (training_view(tmp_path / f"large.{kind}", 32, draws).astype(int) for kind in ("jpg", "png"))
        # a gradient of 255 in 480 pixels: two pixels of displacement would be more; quality 95 costs the rest
        assert np.abs(small - exact).max() <= 3


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
def test_a_crop_lies_inside_and_has_the_promised_area_and_ratio(width: int, height: int, seed: int) -> None:
    draws = torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(seed)).tolist()
    left, top, w, h = random_crop(width, height, draws)
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height
    assert w >= 1
    assert h >= 1
    if min(w, h) > 50:  # where rounding to whole pixels is a percent at most
        assert 0.74 < w / h < 1.35
        assert w * h / (width * height) > 0.078 or not 0.5 < width / height < 2


def test_crops_spread_evenly_over_areas_and_places() -> None:
    draws = torch.rand(4000, NUM_DRAWS, generator=torch.Generator().manual_seed(0)).tolist()
    # In a wide image every area fits, so that each share of the area from 8 % on is as likely as each other one
    boxes = np.array([random_crop(4000, 4000, each) for each in draws])
    areas = boxes[:, 2] * boxes[:, 3] / 4000**2
    small = areas[areas < 0.5]  # all of these fit at every ratio
    counts, _ = np.histogram(small, bins=4, range=(0.08, 0.5))
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    assert np.abs(centres.mean(0) - 2000).max() < 5 * centres.std() / np.sqrt(4000)


def test_where_no_attempt_fits_the_crop_is_the_largest_in_the_centre() -> None:
    draws = [0.5] * NUM_DRAWS  # half the area, square: never in a strip
    assert random_crop(1000, 30, draws) == (480, 0, 40, 30)
    assert random_crop(30, 1000, draws) == (0, 480, 30, 40)
    assert random_crop(3, 1, draws) == (1, 0, 1, 1)


def test_a_thin_strip_takes_no_memory(tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 1), RED).save(tmp_path / "strip.png")
    # resized as a whole it would have 60,000 x 256 x 256 pixels
    assert (evaluation_view(tmp_path / "strip.png", 224) == np.array(RED)[:, None, None]).all()


def jpeg(quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def png_with_broken_pixels() -> bytes:
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[2000:2100] = bytes(100)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not an image"),
        (b"this is text\n" * 100, "not an image"),
        (jpeg()[:-500], "image file is truncated"),
        (jpeg()[:60], "Truncated File Read"),
        (png_with_broken_pixels(), "broken data stream"),
    ],
    ids=["empty", "text", "cut off", "half a header", "broken pixels"],
)
def test_a_damaged_file_is_found(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "damaged.JPEG"
    path.write_bytes(content)
    found = what_is_wrong(path)
    assert found is not None
    assert re.search(why, found)
    assert str(tmp_path) not in found


def test_links_to_nowhere_pipes_and_floating_point_pixels_are_found(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    assert what_is_wrong(tmp_path / "link.png") == "No such file or directory"
    os.mkfifo(tmp_path / "pipe.png")
    assert what_is_wrong(tmp_path / "pipe.png") == "not a file"
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    assert what_is_wrong(tmp_path / "float.tif") == "its pixels are floating-point numbers of no known range"
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "32-bit.tif")
    assert what_is_wrong(tmp_path / "32-bit.tif") == "its pixels have more than 16 bits"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's
def test_a_damaged_exif_block_is_no_damaged_image(tmp_path: Path) -> None:
    content = jpeg()
    block = b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff"
    marked = content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:]
    (tmp_path / "marked.jpg").write_bytes(marked)
    (tmp_path / "plain.jpg").write_bytes(content)
    assert what_is_wrong(tmp_path / "marked.jpg") is None
    assert np.array_equal(evaluation_view(tmp_path / "marked.jpg", 16), evaluation_view(tmp_path / "plain.jpg", 16))
