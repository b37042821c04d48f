import json
import math
import runpy
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_recipes import assert_same, numbers, trained
from torch import Tensor

from trimtab.errors import RecipeError
from trimtab.tasks.images import Augment, ImagesRecipe, augment, rand_augment, vit_digits
from trimtab.tasks.images.augment import augmentation, mixup
from trimtab.tasks.typed import typed
from trimtab.train import Hardware, train
from trimtab.train.progress import Progress

EVERYTHING = Augment(
    crop=1, flip=True, rand_augment=(2, 9), erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1
)  # fmt: skip


def same(images: Tensor) -> Tensor:
    return images.float()


def made(options: Augment, side: int = 8, classes: int = 200) -> Callable[..., tuple[Tensor, Tensor]]:
    return augmentation(options, same, side, classes)


def images(count: int, channels: int = 3, side: int = 8) -> Tensor:
    return torch.randint(256, (count, channels, side, side), dtype=torch.uint8)


def numbered(count: int, side: int = 8) -> tuple[Tensor, Tensor]:
    """Images that are of one value each, and that value as their label."""
    labels = torch.arange(count)
    return labels.to(torch.uint8)[:, None, None, None].expand(count, 3, side, side).contiguous(), labels


def test_without_options_nothing_is_done() -> None:
    batch = images(4), torch.arange(4)
    state = torch.random.get_rng_state()
    found = made(Augment())(*batch)
    assert torch.equal(found[0], batch[0].float())
    assert found[1] is batch[1]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_cutmix_labels_are_the_shares_of_the_pixels() -> None:
    torch.manual_seed(0)
    batch, labels = numbered(200)
    mixed, shares = made(Augment(cutmix=1.0))(batch, labels)
    for image, row in zip(mixed[:, 0], shares, strict=True):
        counted = torch.bincount(image.round().long().flatten(), minlength=200) / 64
        torch.testing.assert_close(row, counted, rtol=0, atol=1e-6)
    own = shares.diagonal()
    assert 0.4 < own.mean() < 0.8
    assert own.min() < 0.25  # a rectangle of 7 × 7 of the 8 × 8 pixels


def test_cutmix_lays_one_rectangle_over_an_image() -> None:
    torch.manual_seed(0)
    batch, labels = numbered(200)
    mixed, _ = made(Augment(cutmix=1.0))(batch, labels)
    other = mixed[:, 0].round().long() != labels[:, None, None]
    for mask in other[other.flatten(1).any(dim=1)]:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert torch.equal(mask, rows[:, None] & columns)
        assert rows.nonzero().diff(dim=0).le(1).all()
        assert columns.nonzero().diff(dim=0).le(1).all()


def test_mixup_labels_are_the_shares_of_the_images() -> None:
    torch.manual_seed(0)
    batch, labels = numbered(200)
    mixed, shares = mixup(batch.float(), labels, 0.8, 200)
    values = mixed[:, 0, 0, 0]
    torch.testing.assert_close(mixed, values[:, None, None, None].expand_as(mixed))
    torch.testing.assert_close(shares @ torch.arange(200.0), values, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(200))
    assert ((shares > 0).sum(dim=1) <= 2).all()


def test_mixup_draws_its_shares_from_the_beta_distribution() -> None:
    torch.manual_seed(0)
    alpha, labels = 0.3, torch.arange(500)
    drawn = [mixup(torch.zeros(500, 1, 1, 1), labels, alpha, 500)[1].diagonal().double() for _ in range(8)]
    own = torch.cat(drawn)
    # of Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); five standard errors
    assert own.mean().item() == pytest.approx(0.5, abs=5 * (0.156 / 4000) ** 0.5)
    assert own.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_with_both_a_coin_decides_for_each_batch() -> None:
    torch.manual_seed(0)
    augmented = made(Augment(mixup=0.8, cutmix=1.0))
    batch, labels = numbered(8)
    whole = [bool((augmented(batch, labels)[0].frac() == 0).all()) for _ in range(60)]
    assert 15 < sum(whole) < 45  # CutMix keeps pixels as they are; four deviations of 60 coins


def test_the_loss_of_mixed_labels_is_that_of_the_papers() -> None:
    torch.manual_seed(0)
    logits, share = torch.randn(6, 5, dtype=torch.float64), 0.3
    labels, others = torch.randint(5, (2, 6))
    target = share * F.one_hot(labels, 5) + (1 - share) * F.one_hot(others, 5)
    of_both = [F.cross_entropy(logits, each, label_smoothing=0.1) for each in (labels, others)]
    expected = share * of_both[0] + (1 - share) * of_both[1]
    torch.testing.assert_close(F.cross_entropy(logits, target.double(), label_smoothing=0.1), expected)


def test_a_crop_is_a_shifted_image_with_black_around_it() -> None:
    torch.manual_seed(0)
    batch = images(40)
    cropped, labels = made(Augment(crop=2))(batch, torch.arange(40))
    padded = F.pad(batch.float(), (2, 2, 2, 2))
    shifts = set()
    for image, wide in zip(cropped, padded, strict=True):
        places = [(row, column) for row in range(5) for column in range(5)
                  if (wide[:, row : row + 8, column : column + 8] - image).abs().max() < 0.01]  # fmt: skip
        assert len(places) == 1
        shifts.add(places[0])
    assert len(shifts) > 10
    assert torch.equal(labels, torch.arange(40))


def test_half_of_the_images_are_mirrored() -> None:
    torch.manual_seed(0)
    batch = images(200)
    flipped, _ = made(Augment(flip=True))(batch, torch.arange(200))
    kept = (flipped - batch).abs().amax(dim=(1, 2, 3)) < 0.01
    mirrored = (flipped - batch.flip(3)).abs().amax(dim=(1, 2, 3)) < 0.01
    assert (kept ^ mirrored).all()
    assert 60 < mirrored.sum() < 140


def test_erasing_sets_a_rectangle_to_the_mean() -> None:
    torch.manual_seed(0)
    batch = images(200).clamp(min=1)
    erased, _ = made(Augment(erasing=0.25))(batch, torch.arange(200))
    gone = (erased == 0).all(dim=1)
    assert torch.equal(torch.where(gone[:, None], 0, batch.float()), erased)
    assert 25 < gone.flatten(1).any(dim=1).sum() < 75


def test_the_same_random_state_gives_the_same_batch_in_float32_without_gradients() -> None:
    batch = images(40), torch.arange(40)
    augmented = made(EVERYTHING)
    found = []
    for autocast in (False, True, False):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(augmented(*batch))
    for changed, target in found:
        assert changed.dtype == target.dtype == torch.float32
        assert not changed.requires_grad
        assert torch.equal(changed, found[0][0])
        assert torch.equal(target, found[0][1])


RECIPE = replace(
    vit_digits(), augment=EVERYTHING, steps=8, batch_size=40, watch=False, watch_every=2, eval_every=4, validation=100,
    model=replace(vit_digits().model, dim=8, depth=1, drop_path=0.1, dropout=0.1),
)  # fmt: skip


class StopError(Exception):
    pass


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    recipe = replace(RECIPE, precision="bf16", checkpoint_every=3)

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            raise StopError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = train(recipe, tmp_path / "whole", hardware=Hardware("cpu"))
        with pytest.raises(StopError):
            train(recipe, tmp_path / "parts", stop, hardware=Hardware("cpu"))
        again = train(recipe, tmp_path / "parts", hardware=Hardware("cpu"))
    assert (again.loss, again.metrics, again.test) == (whole.loss, whole.metrics, whole.test)
    assert set(whole.test) == {"accuracy", "eval_loss"}
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert_same(trained(recipe, tmp_path / "parts"), trained(recipe, tmp_path / "whole"))


def test_a_recipe_without_augmentation_never_imports_kornia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)  # importing it is an error now
    for module in (augment, rand_augment):
        runpy.run_path(module.__file__)
    vit_digits().task()


def test_augment_survives_the_way_through_run_json() -> None:
    recipe = replace(vit_digits(), augment=EVERYTHING)
    assert typed(ImagesRecipe, json.loads(json.dumps(asdict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": -1}, "augment.crop must be at least 0 pixels, got -1"),
        ({"rand_augment": (0, 9)}, "augment.rand_augment must be at least 1 operation"),
        ({"rand_augment": (2, 31)}, "a magnitude from 0 to 30, got 2 and 31"),
        ({"mixup": -0.1}, "augment.mixup must be a number, at least 0, got -0.1"),
        ({"cutmix": math.inf}, "augment.cutmix must be a number, at least 0, got inf"),
        ({"erasing": 1.1}, "augment.erasing must be between 0 and 1, got 1.1"),
        ({"label_smoothing": -1}, "augment.label_smoothing must be between 0 and 1, got -1"),
    ],
)
def test_what_is_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Augment(**changes)


def test_a_crop_wider_than_the_image_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"augment\.crop must be below the image's side of 8 pixels, got 8"):
        made(Augment(crop=8))


def test_a_missing_kornia_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    for options in (Augment(flip=True), Augment(rand_augment=(2, 9))):
        with pytest.raises(RecipeError, match=r"kornia, which is missing: pip install 'trimtab\[lab\]'"):
            made(options)
