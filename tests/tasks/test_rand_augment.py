import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from trimtab.tasks.images import rand_augment as module
from trimtab.tasks.images.rand_augment import rand_augment

LEVEL = 0.6
IN_PILLOW: dict[int, Callable[[Image.Image, float], Image.Image]] = {
    0: lambda image, _: image,
    1: lambda image, _: ImageOps.autocontrast(image),
    2: lambda image, _: ImageOps.equalize(image),
    4: lambda image, level: ImageOps.solarize(image, math.ceil(256 * (1 - abs(level)))),
    5: lambda image, level: ImageOps.posterize(image, round(8 - 4 * abs(level))),
    6: lambda image, level: ImageEnhance.Contrast(image).enhance(1 + 0.9 * level),
    7: lambda image, level: ImageEnhance.Brightness(image).enhance(1 + 0.9 * level),
    8: lambda image, level: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * level),
    13: lambda image, level: ImageEnhance.Color(image).enhance(1 + 0.9 * level),
}


def images(count: int, channels: int = 3, side: int = 16) -> Tensor:
    return torch.randint(256, (count, channels, side, side)) / 255


@pytest.mark.parametrize("level", [LEVEL, -LEVEL])
@pytest.mark.parametrize("number", list(IN_PILLOW))
def test_the_operations_on_colours_are_pillows(number: int, level: float) -> None:
    """AutoAugment and RandAugment are defined by Pillow's operations."""
    torch.manual_seed(0)
    batch = images(3)
    found = module._operations(colour=True)[number](batch, torch.full((3,), level))
    for image, changed in zip(batch, found, strict=True):
        pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
        expected = np.asarray(IN_PILLOW[number](Image.fromarray(pixels), level)).astype(float)
        # Pillow rounds to whole values, also the mean that it mixes with, to either side
        np.testing.assert_allclose(changed.mul(255).permute(1, 2, 0).numpy(), expected, atol=1.6)


def test_all_but_two_operations_are_the_identity_at_a_magnitude_of_zero() -> None:
    batch = images(4)
    for number, operation in enumerate(module._operations(colour=True)):
        if number not in (1, 2):  # contrast and histogram have no magnitude
            torch.testing.assert_close(operation(batch, torch.zeros(4)), batch, rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", [1.0, -0.5])
def test_rotations_shears_and_translations_go_as_far_as_the_papers(level: float) -> None:
    line = torch.zeros(1, 3, 101, 101)
    line[..., 50] = 1
    rotate, across, down, right, below = (module._operations(colour=True)[number] for number in (3, 9, 10, 11, 12))

    def places(operation: module.Operation, lines: Tensor, along: int) -> Tensor:
        """Where the line lies, in each row or column."""
        return operation(lines, torch.tensor([level]))[0, 0].argmax(dim=along).double()

    def slope(found: Tensor) -> float:
        return abs((found[65] - found[35]).item()) / 30

    # pixels are 1/30 apart
    assert slope(places(rotate, line, 1)) == pytest.approx(np.tan(np.radians(30 * abs(level))), abs=0.034)
    assert slope(places(across, line, 1)) == pytest.approx(0.3 * abs(level), abs=0.034)
    assert slope(places(down, line.mT, 0)) == pytest.approx(0.3 * abs(level), abs=0.034)
    shift = 150 / 331 * 101 * level
    assert places(right, line, 1)[50].item() - 50 == pytest.approx(shift, abs=1)
    assert places(below, line.mT, 0)[50].item() - 50 == pytest.approx(shift, abs=1)


def test_each_image_has_operations_of_its_own_to_either_side() -> None:
    torch.manual_seed(0)
    one = images(1).expand(400, -1, -1, -1)
    changed = rand_augment(one, 1, 20)
    kinds = {tuple(image.mul(255).round().int().flatten().tolist()) for image in changed}
    assert len(kinds) == 5 + 2 * 9  # of fourteen, nine have two sides
    assert len({tuple(image.flatten().tolist()) for image in rand_augment(one, 2, 20)}) > 100


@pytest.mark.parametrize("channels", [1, 3])
def test_the_range_stays_and_the_given_images_too(channels: int) -> None:
    torch.manual_seed(0)
    batch = images(300, channels)
    batch[:100] = torch.tensor([0.0, 0.5, 1.0])[torch.arange(100) % 3, None, None, None]  # of a single value
    given = batch.clone()
    changed = rand_augment(batch, 2, 27)
    assert torch.equal(batch, given)
    assert changed.shape == batch.shape
    assert -1e-6 <= changed.min() <= changed.max() <= 1 + 1e-6
    assert changed.flatten(1).std(dim=1)[100:].median() > 0.1  # images are left, no even planes


def test_an_image_of_a_single_value_keeps_it_under_auto_contrast() -> None:
    plane = torch.full((2, 3, 8, 8), 0.4)
    assert torch.equal(module._auto_contrast(plane), plane)
